"""Samples, the spool on disk, and the order in which late samples are sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from lamplighter_agent.config import AgentConfig, RequestsConfig, TelemetryConfig
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.metrics import prometheus_text
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.spool import Spool
from lamplighter_agent.service.telemetry import Sampler, TelemetryReporter
from lamplighter_agent.service.worker import WorkerSpec


class Sink:
    """Takes samples while it is connected."""

    def __init__(self) -> None:
        self.is_connected = False
        self.samples: list[tuple[bool, int]] = []

    def publish_telemetry(self, sample: bytes, *, qos: int = 0) -> bool:
        if self.is_connected:
            self.samples.append((json.loads(sample)["historical"], qos))
        return self.is_connected


def make_sampler(folder: Path) -> tuple[AgentConfig, Sampler]:
    config = AgentConfig(state_dir=folder, telemetry=TelemetryConfig(spool_mb=1))
    requests = RequestQueue(RequestsConfig())
    runner = PackageRunner(WorkerSpec(package=folder), requests, lambda: None)
    return config, Sampler(config, 3, requests, runner, lambda: "idle")


def test_samples_wait_on_disk_and_are_sent_in_order_before_fresh_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        config, sampler = make_sampler(tmp_path)
        sink = Sink()
        reporter = TelemetryReporter(config, sampler, sink)
        reporter.report()
        reporter.report()
        assert sink.samples == []
        reporter = TelemetryReporter(config, sampler, sink)  # a restart keeps them
        sink.is_connected = True
        await reporter.replay()
        assert sink.samples == [(True, 1), (True, 1), (False, 0)]

    asyncio.run(scenario())


def test_a_sample_knows_the_machine_without_a_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        _, sampler = make_sampler(tmp_path)
        sample = sampler.sample()
        assert (sample.boot, sample.worker, sample.package) == (3, "no_package", None)
        assert sample.memory_total_bytes > sample.memory_available_bytes > 0
        assert sample.agent_rss_bytes > 0
        text = prometheus_text(sample)
        assert "\nlamplighter_queue_depth 0\n" in text
        assert "worker_rss_bytes" not in text

    asyncio.run(scenario())


def test_the_spool_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=30)
    for number in range(5):
        spool.push(b"%010d" % number)
    assert (len(spool), spool.dropped, spool.nbytes) == (3, 2, 30)
    assert spool.first() == b"0000000002"


def test_the_spool_survives_a_restart_and_forgets_half_written_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=100)
    spool.push(b"one")
    spool.push(b"two")
    (tmp_path / "0000000000000003.part").write_bytes(b"hal")
    spool = Spool(tmp_path, max_bytes=100)
    assert [spool.first(), len(spool)] == [b"one", 2]
    spool.drop_first()
    spool.push(b"three")
    spool.drop_first()
    assert spool.first() == b"three"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_message_larger_than_the_spool_is_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=5)
    spool.push(b"123456")
    assert (len(spool), spool.dropped) == (0, 1)


def test_a_spooled_file_that_vanished_is_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=100)
    spool.push(b"one")
    spool.push(b"two")
    min(tmp_path.iterdir()).unlink()
    assert (spool.first(), spool.dropped) == (b"two", 1)
