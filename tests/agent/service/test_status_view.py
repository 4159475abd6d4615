"""A sample as text for a person."""

from __future__ import annotations

import msgspec

from lamplighter_agent.service.status_view import duration, quantile, status_lines
from lamplighter_agent.service.telemetry_message import Latencies, LatencyRecorder, TelemetryMessage

SAMPLE = TelemetryMessage(
    time_unix_s=1.0, boot=3, uptime_s=3700.0, agent="0.1.0", package="tiny/1", update_state="active", worker="ready",
    worker_restarts=1, queue_depth=2, requests_active=1, requests_total=9, requests_refused=4, requests_failed=0,
    prompt_tokens_total=90, generated_tokens_total=30, generated_tokens_per_s=20.0, prompt_tokens_per_s=100.0,
    time_to_first_token_s=0.25, worker_rss_bytes=100 << 20, worker_peak_rss_bytes=120 << 20,
    agent_rss_bytes=50 << 20, cpu_percent=12.0, load_1m=0.5, memory_total_bytes=1 << 30,
    memory_available_bytes=1 << 29, disk_free_bytes=1 << 30, memory_pressure_percent=1.5,
)  # fmt: skip


def test_it_says_what_is_known_and_leaves_out_the_rest() -> None:
    text = "\n".join(status_lines(SAMPLE))
    assert "tiny/1" in text
    assert "ready, 1 unplanned restarts" in text
    assert "up 1 h 1 min" in text
    assert "1 running, 2 waiting; 9 accepted, 4 refused, 0 failed" in text
    assert "engine 100 MiB (peak 120 MiB), agent 50 MiB; 512 MiB of 1024 MiB available" in text
    assert "pressure       memory 1.5 %" in text
    assert "KV cache" not in text
    assert "°C" not in text


def test_without_a_request_there_is_no_latency() -> None:
    bare = msgspec.structs.replace(SAMPLE, generated_tokens_per_s=None, package=None)
    text = "\n".join(status_lines(bare))
    assert "last request" not in text
    assert "package        none" in text


def test_quantiles_are_the_bounds_of_buckets() -> None:
    recorder = LatencyRecorder()
    for _ in range(95):
        recorder.add(0.04)
    for _ in range(5):
        recorder.add(100.0)
    latencies = recorder.snapshot()
    assert (quantile(latencies, 0.5), quantile(latencies, 0.95)) == ("0.05 s", "0.05 s")
    assert quantile(latencies, 0.99) == "more than 60 s"
    assert Latencies().count == 0


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61, 90_061)] == ["0 s", "59 s", "1 min 1 s", "1 d 1 h"]
