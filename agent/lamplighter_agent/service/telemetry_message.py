"""What a device says about its condition, and the shape of its latency figures. Pure."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import msgspec

LATENCY_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """How often something took how long, since the agent's start.

    Attributes:
        count: How often.
        sum_s: All of it together.
        buckets: For each of ``LATENCY_BOUNDS_S`` and then for what took longer, how often it took at most so long and
            longer than the bound before.
    """

    count: int = 0
    sum_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)


class LatencyRecorder:
    """Counts latencies."""

    def __init__(self) -> None:
        self._sum_s = 0.0
        self._buckets = [0] * (len(LATENCY_BOUNDS_S) + 1)

    def add(self, seconds: float) -> None:
        """Count one."""
        self._sum_s += seconds
        self._buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1

    def snapshot(self) -> Latencies:
        """Return the state of now."""
        return Latencies(count=sum(self._buckets), sum_s=self._sum_s, buckets=tuple(self._buckets))


class TelemetryMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a device's condition. Rates and ``time_to_first_token_s`` are of the last finished request.

    What a machine does not tell is None. Percentages are 0 to 100; counters begin at the agent's start.

    Attributes:
        time_unix_s: When it was taken, by the device's clock.
        boot: Starts of the agent so far.
        uptime_s: Since the agent's start; ``device_uptime_s`` since the machine's.
        agent: The agent's version.
        package: The active package, or None.
        update_state: As in ``reported``.
        worker: State of the engine's worker process.
        worker_restarts: Unplanned restarts of the worker.
        queue_depth: Requests that wait; ``requests_active`` are being answered.
        requests_total: Requests accepted; ``requests_refused`` refused, ``requests_failed`` ended in an error.
        prompt_tokens_total: Prompt tokens; ``cached_tokens_total`` of them the prefix cache spared.
        generated_tokens_total: Tokens generated.
        generated_tokens_per_s: Decode rate.
        time_to_first_token_s: From arrival to the first token.
        first_token: Latencies from arrival to the first token; ``token`` between tokens (the mean of each request);
            ``queue_wait`` from arrival to a slot.
        kv_used_tokens: Tokens in the KV cache, of ``kv_capacity_tokens``; ``prefix_cache_bytes`` are kept for later.
        worker_rss_bytes: Resident memory of the worker now; ``worker_peak_rss_bytes`` its highest.
        agent_rss_bytes: Resident memory of the agent's main process.
        agent_cpu_percent: Use of one core by the main process since the sample before.
        cpu_percent: Use of all cores together since the sample before; ``load_1m`` is the load average.
        cpu_pressure_percent: Share of the last 10 s in which somebody waited for a CPU (PSI, some).
        memory_available_bytes: Memory that programs could still take.
        memory_limit_bytes: The service's own limit (its control group's), or None.
        memory_pressure_percent: Share of the last 10 s in which somebody waited for memory (PSI, some);
            ``memory_stall_percent`` in which everybody did (full).
        io_pressure_percent: The same for the disk (PSI, some).
        swap_used_bytes: Swap in use.
        disk_free_bytes: Free space where the state lies, of ``disk_total_bytes``.
        network_sent_bytes: Sent by all interfaces but the loopback since the machine's start;
            ``network_received_bytes`` received.
        temperature_celsius: The hottest sensor.
        throttled: True if the CPU was slowed down for heat or power since the sample before.
        cpu_frequency_mhz: Mean of the cores now.
        broker_connections: Connections to the broker; ``messages_dropped`` found no room while it was away.
        spool_dropped: Samples lost because the spool was full; ``spool_waiting`` wait in it.
        historical: True for a sample that waited in the spool.
        worker_silent_s: How long the worker has owed a sign of life: above ``engine.stall_timeout_s`` it is replaced.
        worker_last_end: Why the last worker that ended by itself did so.
    """

    time_unix_s: float
    boot: int
    uptime_s: float
    agent: str
    package: str | None
    update_state: str
    worker: str
    worker_restarts: int
    queue_depth: int
    requests_active: int
    requests_total: int
    requests_refused: int
    requests_failed: int
    prompt_tokens_total: int
    generated_tokens_total: int
    generated_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    time_to_first_token_s: float | None
    worker_rss_bytes: int | None
    worker_peak_rss_bytes: int | None
    agent_rss_bytes: int
    cpu_percent: float
    load_1m: float
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    cached_tokens_total: int = 0
    first_token: Latencies = Latencies()
    token: Latencies = Latencies()
    queue_wait: Latencies = Latencies()
    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    prefix_cache_bytes: int | None = None
    agent_cpu_percent: float | None = None
    cpu_pressure_percent: float | None = None
    memory_limit_bytes: int | None = None
    memory_pressure_percent: float | None = None
    memory_stall_percent: float | None = None
    io_pressure_percent: float | None = None
    swap_used_bytes: int | None = None
    disk_total_bytes: int | None = None
    network_sent_bytes: int | None = None
    network_received_bytes: int | None = None
    device_uptime_s: float | None = None
    temperature_celsius: float | None = None
    throttled: bool | None = None
    cpu_frequency_mhz: float | None = None
    broker_connections: int = 0
    messages_dropped: int = 0
    spool_dropped: int = 0
    spool_waiting: int = 0
    historical: bool = False
    worker_silent_s: float | None = None
    worker_last_end: str | None = None
