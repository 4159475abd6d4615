"""The agent's configuration: frozen structs; ``config_file`` reads them from YAML, strict about every key.

``configs/agent.yaml`` shows every setting with its default. Sizes are in MiB where a person writes them and named so;
durations are in seconds.
"""

from __future__ import annotations

import logging
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")]
Seconds = Annotated[float, Meta(gt=0)]
Mebibytes = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
PositiveInt = Annotated[int, Meta(ge=1)]

_MIB = 1024 * 1024


def _default_device_id() -> str:
    """Return the host's name with every character that a topic level may not have replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip(".-") or "device"


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who this box is.

    Attributes:
        id: Name in topics; unique in the fleet. Default: the host name.
        groups: Groups whose shared prompts this box answers.
    """

    id: Name = msgspec.field(default_factory=_default_device_id)
    groups: tuple[Name, ...] = ()


class RepositoryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where packages come from.

    Attributes:
        url: Base URL of the static repository (http, https), or None: then packages come only from ``pull --from``.
        root_file: The trusted TUF root that the operator put on this box; copied into the store on first use.
        check_interval_s: How often the metadata is refreshed.
        ca_file: Private certificate authority for https, or None for the system's.
        proxy: Proxy URL, or None.
        connect_timeout_s: Bound on connecting and on silence while reading.
        low_speed_bytes_per_s: A transfer below this rate for ``low_speed_time_s`` is given up and resumed later.
        speed_limit_bytes_per_s: Highest rate, or None.
        parallel_downloads: Files fetched at once.
        retries: Tries of one request before the update fails.
        disk_reserve_mb: Space that a download must leave free.
        keep_packages: Installed packages kept besides the current one.
    """

    url: str | None = None
    root_file: Path | None = None
    check_interval_s: Seconds = 3600.0
    ca_file: Path | None = None
    proxy: str | None = None
    connect_timeout_s: Seconds = 20.0
    low_speed_bytes_per_s: Annotated[int, Meta(ge=0)] = 1024
    low_speed_time_s: Seconds = 60.0
    speed_limit_bytes_per_s: PositiveInt | None = None
    parallel_downloads: Annotated[int, Meta(ge=1, le=8)] = 2
    retries: Annotated[int, Meta(ge=0, le=100)] = 5
    disk_reserve_mb: Annotated[int, Meta(ge=0)] = 64
    keep_packages: Annotated[int, Meta(ge=1, le=100)] = 1

    @property
    def disk_reserve_bytes(self) -> int:
        """``disk_reserve_mb`` in bytes."""
        return self.disk_reserve_mb * _MIB


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every package must show in its trial on this device; None asks nothing.

    Attributes:
        min_generated_tokens_per_s: Lowest decode speed.
        max_first_token_s: Longest time to the first token of a self-test prompt.
        max_load_s: Longest time until the engine is ready.
        max_memory_mb: Most memory that the engine process may have used.
    """

    min_generated_tokens_per_s: Annotated[float, Meta(gt=0)] | None = None
    max_first_token_s: Seconds | None = None
    max_load_s: Seconds | None = None
    max_memory_mb: PositiveInt | None = None


class UpdatesConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a new package comes into use.

    Attributes:
        window: Time of day in which a package that was fetched may be tried and taken into use, ``HH:MM-HH:MM`` in
            local time; the end may lie on the next day. None: at any time.
        download_deadline_s: A download that takes longer is reported as failed, and goes on at the next check.
        trial_deadline_s: Longest time for each of preparing, trying and switching.
        probation_s: A new package must have served for so long before it is trusted.
        probation_failures: Crashes within that time with which it is rolled back.
        limits: What its trial must show.
    """

    window: Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = None
    download_deadline_s: Seconds = 86_400.0
    trial_deadline_s: Seconds = 1_800.0
    probation_s: Seconds = 600.0
    probation_failures: Annotated[int, Meta(ge=1, le=100)] = 3
    limits: LimitsConfig = LimitsConfig()


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """TLS to the broker: the authority that signed it and, for mutual TLS, this box's certificate and key.

    Relative paths name credentials of the unit.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


class MqttConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The broker.

    Attributes:
        enabled: False runs the agent with the local API alone.
        protocol: ``5`` or ``3.1.1``.
        prefix: First levels of every topic.
        username: User name, or None.
        password_file: File that holds the password, or None; a relative path names a credential of the unit.
        keepalive_s: Silence after which the broker is asked whether it is there.
        reconnect_max_s: Cap of the reconnect delay; the delay grows from one second with full jitter.
        delta_interval_s: Tokens are batched into one delta for this long.
    """

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")] = "lamplighter/v1"
    username: str | None = None
    password_file: Path | None = None
    tls: TlsConfig | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30
    reconnect_max_s: Seconds = 60.0
    delta_interval_s: Seconds = 0.1


class LocalApiConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP API on a Unix socket.

    Attributes:
        socket: Path of the socket, or None to switch the API off.
        mode: Permissions of the socket, octal digits.
        group: Group that owns the socket, or None to keep the process's.
        max_body_bytes: Largest request body.
        max_connections: Requests at once; further ones are refused.
        tcp_port: Also listen on this port of the loopback, or None; needs ``token_file``.
        token_file: File with the word that TCP clients send as ``Authorization: Bearer``.
    """

    socket: Path | None = Path("/run/lamplighter/agent.sock")
    mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")] = "0660"
    group: str | None = None
    max_body_bytes: PositiveInt = 1024 * 1024
    max_connections: PositiveInt = 32
    tcp_port: Port | None = None
    token_file: Path | None = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The generation engine. None means: choose from the package and the machine.

    Attributes:
        memory_budget_mb: Most memory that the worker process may plan for.
        threads: Threads of the model's operators.
        max_context_tokens: Cap on prompt and generated tokens together.
        slots: Requests generated at once.
        kv_cache_dtype: ``float32`` or ``int8``; None takes int8 only where float32 has no room for a good context.
        speculation: Guess tokens of a request that decodes alone from its text so far; the tokens are the same without.
        prompt_weights: Compute prompts with weights of their own where that is faster and memory is left for them.
        prefix_cache_mb: Most memory for the beginnings of earlier prompts; 0 switches the prefix cache off.
        prefix_disk_mb: Most disk space for those that are kept over a restart; 0 keeps none.
        pinned_prompts: System prompts that are computed at the start and stay in the prefix cache.
        start_timeout_s: A worker that is not ready by then is ended.
        stall_timeout_s: A worker that gives no sign of life for this long while it has work is ended.
    """

    memory_budget_mb: Mebibytes | None = None
    threads: Annotated[int, Meta(ge=1, le=256)] | None = None
    max_context_tokens: Annotated[int, Meta(ge=16)] | None = None
    slots: Annotated[int, Meta(ge=1, le=64)] | None = None
    kv_cache_dtype: Literal["float32", "int8"] | None = None
    speculation: bool = True
    prompt_weights: bool = False
    prefix_cache_mb: Annotated[int, Meta(ge=0)] | None = None
    prefix_disk_mb: Annotated[int, Meta(ge=0)] = 64
    pinned_prompts: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    start_timeout_s: Seconds = 300.0
    stall_timeout_s: Seconds = 120.0


class RequestsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Admission of prompts.

    Attributes:
        queue_size: Requests that may wait; one more is refused with code 429.
        rate_per_s: Requests a second that one client may keep up; more are refused with code 429.
        burst: Requests that one client may send at once beyond that.
        default_deadline_s: Deadline of a request that names none.
        max_tokens: Generated tokens of a request that names no limit.
    """

    queue_size: Annotated[int, Meta(ge=1, le=10_000)] = 32
    rate_per_s: Annotated[float, Meta(gt=0)] = 10.0
    burst: PositiveInt = 40
    default_deadline_s: Seconds = 300.0
    max_tokens: PositiveInt = 512


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Telemetry.

    Attributes:
        interval_s: Time between two samples.
        batch_size: Samples sent together in one message.
        spool_mb: Most disk space for samples that wait for the broker; the oldest go first.
    """

    interval_s: Seconds = 30.0
    batch_size: Annotated[int, Meta(ge=1, le=16)] = 1
    spool_mb: Mebibytes = 8


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Logging to standard error; prompts are never logged unless ``prompts`` is true."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = False

    @property
    def numeric_level(self) -> int:
        """The level as the logging module counts."""
        return logging.getLevelNamesMapping()[self.level.upper()]


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the agent can be told.

    Attributes:
        state_dir: The agent's own directory: packages, trusted metadata, spool.
    """

    device: DeviceConfig = DeviceConfig()
    state_dir: Path = Path("/var/lib/lamplighter")
    repository: RepositoryConfig = RepositoryConfig()
    updates: UpdatesConfig = UpdatesConfig()
    mqtt: MqttConfig = MqttConfig()
    local_api: LocalApiConfig = LocalApiConfig()
    engine: EngineConfig = EngineConfig()
    requests: RequestsConfig = RequestsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    log: LogConfig = LogConfig()
