"""A telemetry sample as Prometheus text. Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from lamplighter_agent.service.messages import TelemetryMessage

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_METRICS: Final[tuple[tuple[str, Literal["gauge", "counter"], str], ...]] = (
    ("uptime_s", "gauge", "Seconds since the agent's start"),
    ("worker_restarts", "counter", "Unplanned restarts of the engine worker"),
    ("queue_depth", "gauge", "Requests that wait"),
    ("requests_active", "gauge", "Requests that are being answered"),
    ("requests_total", "counter", "Requests accepted"),
    ("requests_refused", "counter", "Requests refused"),
    ("requests_failed", "counter", "Requests that ended in an error"),
    ("prompt_tokens_total", "counter", "Prompt tokens processed"),
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
    ("spool_dropped", "counter", "Telemetry samples lost because the spool was full"),
)


def prometheus_text(sample: TelemetryMessage) -> str:
    """Return a sample in Prometheus's text format; values that are not known are left out."""
    values = msgspec.structs.asdict(sample)
    lines: list[str] = []
    for field, kind, text in _METRICS:
        value = values[field]
        if value is not None:
            name = f"lamplighter_{field}"
            lines += [f"# HELP {name} {text}.", f"# TYPE {name} {kind}", f"{name} {value}"]
    labels = f'agent="{_escape(sample.agent)}",package="{_escape(sample.package or "")}",worker="{sample.worker}"'
    lines += [
        "# HELP lamplighter_info What runs here.",
        "# TYPE lamplighter_info gauge",
        f"lamplighter_info{{{labels}}} 1",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
