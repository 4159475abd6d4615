"""Samples, the spool on disk, and the order in which late samples are sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.config import AgentConfig, RequestsConfig, TelemetryConfig
from lamplighter_agent.errors import StoreError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.metrics import prometheus_text
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.spool import Spool
from lamplighter_agent.service.telemetry import Sampler, TelemetryReporter
from lamplighter_agent.service.telemetry_message import LATENCY_BOUNDS_S, LatencyRecorder, TelemetryMessage
from lamplighter_agent.service.worker import WorkerSpec
from support.broken_disk import BrokenDisk, DiskFault


class Sink:
    """Takes samples while it is connected."""

    def __init__(self) -> None:
        self.is_connected = False
        self.samples: list[tuple[bool, int]] = []
        self.messages = 0

    def publish_telemetry(self, sample: bytes, *, qos: int = 0) -> bool:
        if self.is_connected:
            decoded = json.loads(sample)
            for each in decoded if isinstance(decoded, list) else [decoded]:
                self.samples.append((each["historical"], qos))
            self.messages += 1
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
        await reporter.report()
        await reporter.report()
        assert sink.samples == []
        reporter = TelemetryReporter(config, sampler, sink)  # a restart keeps them
        sink.is_connected = True
        await reporter.replay()
        assert sink.samples == [(True, 1), (True, 1), (False, 0)]

    asyncio.run(scenario())


def test_a_sample_knows_the_machine_without_a_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        _, sampler = make_sampler(tmp_path)
        sample = await sampler.sample()
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


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_spool_on_a_disk_that_takes_nothing_keeps_its_bound_and_sends_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: DiskFault
) -> None:
    disk = BrokenDisk(monkeypatch)
    spool = Spool(tmp_path, max_bytes=20)
    for message in (b"0123456789", b"abcdefghij"):
        spool.push(message)
    disk.fault = fault
    for _ in range(3):
        with pytest.raises(StoreError):
            spool.push(b"ABCDEFGHIJ")
    assert (spool.nbytes, spool.first()) == (10, b"abcdefghij")
    spool.drop_first()
    assert (spool.nbytes, spool.first()) == (0, None)
    disk.fault = None
    spool.push(b"ABCDEFGHIJ")
    assert spool.first() == b"ABCDEFGHIJ"
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_a_sample_that_cannot_be_taken_is_not_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        config, sampler = make_sampler(tmp_path)
        config = msgspec.structs.replace(config, telemetry=TelemetryConfig(interval_s=0.01))
        sink = Sink()
        sink.is_connected = True
        taken, sample = asyncio.Event(), sampler.sample

        async def second_time() -> TelemetryMessage:
            if not taken.is_set():
                taken.set()
                raise OSError("the sensors are gone")
            return await sample()

        monkeypatch.setattr(sampler, "sample", second_time)
        running = asyncio.create_task(TelemetryReporter(config, sampler, sink).run())
        async with asyncio.timeout(20):
            while not sink.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        running.cancel()
        assert sink.samples[0] == (False, 0)

    asyncio.run(scenario())


def test_samples_are_sent_in_batches_and_an_unfinished_batch_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        config, sampler = make_sampler(tmp_path)
        config = msgspec.structs.replace(config, telemetry=TelemetryConfig(batch_size=3, interval_s=0.001))
        sink = Sink()
        sink.is_connected = True
        reporter = TelemetryReporter(config, sampler, sink)
        for _ in range(4):
            await reporter.report()
        assert (sink.messages, sink.samples) == (1, [(False, 0)] * 3)
        run = asyncio.create_task(reporter.run())
        await asyncio.sleep(0)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        again = TelemetryReporter(config, sampler, sink)
        await again.replay()
        assert sink.samples[3:] == [(True, 1), (True, 1), (False, 0)]

    asyncio.run(scenario())


def test_a_sample_tells_what_the_workers_caches_hold(spec: WorkerSpec, tmp_path: Path) -> None:
    async def scenario() -> None:
        requests = RequestQueue(RequestsConfig())
        runner = PackageRunner(spec, requests, lambda: None)
        sampler = Sampler(AgentConfig(state_dir=tmp_path), 1, requests, runner, lambda: "idle")
        await runner.switch(spec.package)
        sample = await sampler.sample()
        assert (sample.kv_used_tokens, sample.kv_capacity_tokens, sample.prefix_cache_bytes) == (0, 8192, 1000)
        await runner.stop(0.0)

    asyncio.run(scenario())


def test_latencies_are_counted_between_bounds() -> None:
    recorder = LatencyRecorder()
    for seconds in (0.005, 0.006, 3.0, 1000.0):
        recorder.add(seconds)
    latencies = recorder.snapshot()
    assert latencies.count == 4
    assert [index for index, count in enumerate(latencies.buckets) if count] == [0, 1, 9, len(LATENCY_BOUNDS_S)]


def test_prometheus_gets_cumulative_buckets(tmp_path: Path) -> None:
    async def scenario() -> str:
        _, sampler = make_sampler(tmp_path)
        recorder = LatencyRecorder()
        for seconds in (0.004, 0.2, 99.0):
            recorder.add(seconds)
        return prometheus_text(msgspec.structs.replace(await sampler.sample(), first_token=recorder.snapshot()))

    lines = asyncio.run(scenario()).splitlines()
    buckets = [line.split()[-1] for line in lines if line.startswith("lamplighter_first_token_s_bucket")]
    assert buckets == ["1"] * 5 + ["2"] * 8 + ["3"]
    assert "lamplighter_first_token_s_count 3" in lines
