"""A telemetry sample as Prometheus text. Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from lamplighter_agent.service.messages import TelemetryMessage
from lamplighter_agent.service.telemetry_message import LATENCY_BOUNDS_S, Latencies

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_METRICS: Final[tuple[tuple[str, Literal["gauge", "counter"], str], ...]] = (
    ("uptime_s", "gauge", "Seconds since the agent's start"),
    ("worker_restarts", "counter", "Unplanned restarts of the engine worker"),
    ("worker_silent_s", "gauge", "How long the engine worker has owed a sign of life"),
    ("queue_depth", "gauge", "Requests that wait"),
    ("requests_active", "gauge", "Requests that are being answered"),
    ("requests_total", "counter", "Requests accepted"),
    ("requests_refused", "counter", "Requests refused"),
    ("requests_failed", "counter", "Requests that ended in an error"),
    ("prompt_tokens_total", "counter", "Prompt tokens processed"),
    ("cached_tokens_total", "counter", "Prompt tokens that the prefix cache spared"),
    ("generated_tokens_total", "counter", "Tokens generated"),
    ("generated_tokens_per_s", "gauge", "Decode rate of the last request"),
    ("prompt_tokens_per_s", "gauge", "Prefill rate of the last request"),
    ("time_to_first_token_s", "gauge", "From arrival to the first token of the last request"),
    ("worker_rss_bytes", "gauge", "Resident memory of the engine worker"),
    ("worker_peak_rss_bytes", "gauge", "Highest resident memory of the engine worker"),
    ("agent_rss_bytes", "gauge", "Resident memory of the agent's main process"),
    ("cpu_percent", "gauge", "Use of all cores together"),
    ("load_1m", "gauge", "Load average of a minute"),
    ("memory_total_bytes", "gauge", "Memory of the machine"),
    ("memory_available_bytes", "gauge", "Memory that programs could still take"),
    ("disk_free_bytes", "gauge", "Free space where the state lies"),
    ("temperature_celsius", "gauge", "The hottest sensor"),
    ("kv_used_tokens", "gauge", "Tokens in the KV cache"),
    ("kv_capacity_tokens", "gauge", "Tokens that fit into the KV cache"),
    ("prefix_cache_bytes", "gauge", "Prefixes kept for later prompts"),
    ("agent_cpu_percent", "gauge", "Use of one core by the agent's main process"),
    ("cpu_pressure_percent", "gauge", "Time in which somebody waited for a CPU (PSI)"),
    ("memory_limit_bytes", "gauge", "Memory limit of the service"),
    ("memory_pressure_percent", "gauge", "Time in which somebody waited for memory (PSI)"),
    ("memory_stall_percent", "gauge", "Time in which everybody waited for memory (PSI)"),
    ("io_pressure_percent", "gauge", "Time in which somebody waited for the disk (PSI)"),
    ("swap_used_bytes", "gauge", "Swap in use"),
    ("disk_total_bytes", "gauge", "Size of the disk where the state lies"),
    ("network_sent_bytes", "counter", "Sent by all interfaces but the loopback"),
    ("network_received_bytes", "counter", "Received by all interfaces but the loopback"),
    ("device_uptime_s", "gauge", "Seconds since the machine's start"),
    ("throttled", "gauge", "1 if the CPU was slowed down for heat or power"),
    ("cpu_frequency_mhz", "gauge", "Mean frequency of the cores"),
    ("broker_connections", "counter", "Connections to the broker"),
    ("messages_dropped", "counter", "Messages that found no room while the broker was away"),
    ("spool_dropped", "counter", "Telemetry samples lost because the spool was full"),
    ("spool_waiting", "gauge", "Telemetry messages in the spool"),
)
_HISTOGRAMS: Final[tuple[tuple[str, str], ...]] = (
    ("first_token", "From a prompt's arrival to its first token"),
    ("token", "Between two tokens, the mean of each request"),
    ("queue_wait", "From a prompt's arrival to a slot"),
)


def prometheus_text(sample: TelemetryMessage) -> str:
    """Return a sample in Prometheus's text format; values that are not known are left out."""
    values = msgspec.structs.asdict(sample)
    lines: list[str] = []
    for field, kind, text in _METRICS:
        value = values[field]
        if value is not None:
            name = f"lamplighter_{field}"
            lines += [f"# HELP {name} {text}.", f"# TYPE {name} {kind}", f"{name} {+value}"]
    for field, text in _HISTOGRAMS:
        lines += _histogram(f"lamplighter_{field}_s", text, values[field])
    labels = f'agent="{_escape(sample.agent)}",package="{_escape(sample.package or "")}",worker="{sample.worker}"'
    lines += [
        "# HELP lamplighter_info What runs here.",
        "# TYPE lamplighter_info gauge",
        f"lamplighter_info{{{labels}}} 1",
    ]
    return "\n".join(lines) + "\n"


def _histogram(name: str, text: str, latencies: Latencies) -> list[str]:
    """Return a histogram with Prometheus's cumulative buckets."""
    lines = [f"# HELP {name} {text}.", f"# TYPE {name} histogram"]
    below = 0
    for bound, count in zip((*map(str, LATENCY_BOUNDS_S), "+Inf"), latencies.buckets, strict=True):
        below += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
    return [*lines, f"{name}_sum {latencies.sum_s}", f"{name}_count {latencies.count}"]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
