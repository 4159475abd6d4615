"""A telemetry sample as a person reads it in a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lamplighter_agent.service.messages import TelemetryMessage
from lamplighter_agent.service.telemetry_message import LATENCY_BOUNDS_S, Latencies

_MIB: Final = 1024 * 1024
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def status_lines(sample: TelemetryMessage) -> Iterator[str]:
    """Yield the lines of a report; what is not known is left out."""
    yield _line("package", sample.package or "none")
    engine = f"{sample.worker}, {sample.worker_restarts} unplanned restarts"
    yield _line("engine", engine)
    yield _line("update", sample.update_state)
    broker = f"{sample.broker_connections} connections, {sample.messages_dropped} messages dropped"
    yield _line("broker", f"{broker}, {sample.spool_waiting} samples waiting, {sample.spool_dropped} lost")
    yield _line("agent", f"version {sample.agent}, start {sample.boot}, up {duration(sample.uptime_s)}")
    yield ""
    requests = f"{sample.requests_active} running, {sample.queue_depth} waiting; {sample.requests_total} accepted, "
    yield _line("requests", f"{requests}{sample.requests_refused} refused, {sample.requests_failed} failed")
    prompt = f"{sample.prompt_tokens_total} of prompts ({sample.cached_tokens_total} from the prefix cache)"
    yield _line("tokens", f"{prompt}, {sample.generated_tokens_total} generated")
    if sample.generated_tokens_per_s is not None:
        first = f"{sample.time_to_first_token_s or 0.0:.3f} s to the first token"
        prefill = f"{sample.prompt_tokens_per_s or 0.0:.0f} prompt tokens/s"
        yield _line("last request", f"{sample.generated_tokens_per_s:.1f} tokens/s, {prefill}, {first}")
    kinds = {"first token": sample.first_token, "each token": sample.token, "queue wait": sample.queue_wait}
    for name, latencies in kinds.items():
        if latencies.count:
            mean = latencies.sum_s / latencies.count
            half, most = quantile(latencies, 0.5), quantile(latencies, 0.95)
            yield _line(name, f"mean {mean:.3f} s, half within {half}, 95 % within {most}")
    if sample.kv_capacity_tokens:
        used = f"{sample.kv_used_tokens} of {sample.kv_capacity_tokens} tokens"
        yield _line("KV cache", f"{used}, prefixes {_mib(sample.prefix_cache_bytes)}")
    yield ""
    yield from _machine_lines(sample)


def _machine_lines(sample: TelemetryMessage) -> Iterator[str]:
    worker = f"engine {_mib(sample.worker_rss_bytes)} (peak {_mib(sample.worker_peak_rss_bytes)})"
    limit = f", limit {_mib(sample.memory_limit_bytes)}" if sample.memory_limit_bytes else ""
    free = f"{_mib(sample.memory_available_bytes)} of {_mib(sample.memory_total_bytes)} available"
    yield _line("memory", f"{worker}, agent {_mib(sample.agent_rss_bytes)}; {free}{limit}")
    cpu = f"{sample.cpu_percent:.0f} %, load {sample.load_1m:.2f}"
    if sample.temperature_celsius is not None:
        cpu += f", {sample.temperature_celsius:.0f} °C"
    if sample.throttled is not None:
        cpu += ", slowed down" if sample.throttled else ", not throttled"
    yield _line("cpu", cpu)
    pressures = {
        "cpu": sample.cpu_pressure_percent,
        "memory": sample.memory_pressure_percent,
        "disk": sample.io_pressure_percent,
    }
    known = [f"{name} {value:.1f} %" for name, value in pressures.items() if value is not None]
    if known:
        yield _line("pressure", ", ".join(known))
    yield _line("disk", f"{_mib(sample.disk_free_bytes)} free of {_mib(sample.disk_total_bytes)}")
    if sample.network_sent_bytes is not None:
        sent, received = _mib(sample.network_sent_bytes), _mib(sample.network_received_bytes)
        yield _line("network", f"{sent} sent, {received} received")


def quantile(latencies: Latencies, share: float) -> str:
    """Return the bound below which a share of the latencies lies, as text."""
    below = 0
    for bound, count in zip(LATENCY_BOUNDS_S, latencies.buckets, strict=False):
        below += count
        if below >= share * latencies.count:
            return f"{bound:g} s"
    return f"more than {LATENCY_BOUNDS_S[-1]:g} s"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    parts: list[str] = []
    left = int(seconds)
    for size, unit in _UNITS:
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def _line(name: str, text: str) -> str:
    return f"{name:14} {text}"


def _mib(value: int | None) -> str:
    return "?" if value is None else f"{value / _MIB:.0f} MiB"
