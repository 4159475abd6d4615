"""Samples of the device's condition: taken here, sent on MQTT, kept on disk while the broker is away."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec
import psutil

import lamplighter_agent
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import StoreError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.messages import TelemetryMessage, encode
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.spool import Spool

logger = logging.getLogger(__name__)

SPOOL_NAME: Final = "spool"
_REPLAY_A_SECOND: Final = 20


class Publisher(Protocol):
    """Where samples go."""

    @property
    def is_connected(self) -> bool:
        """True while messages can leave the device."""

    def publish_telemetry(self, sample: bytes, *, qos: int = 0) -> bool:
        """Publish a sample; False if it was not taken."""


class Sampler:
    """Looks at the machine, the worker and the counters.

    Args:
        config: The whole configuration.
        boot: Starts of the agent so far.
        requests: Its counters are read.
        runner: Its worker's memory is read.
        update_state: Gives the state of the update.
    """

    def __init__(
        self,
        config: AgentConfig,
        boot: int,
        requests: RequestQueue,
        runner: PackageRunner,
        update_state: Callable[[], str],
    ) -> None:
        self.spool_dropped = 0
        self._state_dir = config.state_dir
        self._boot = boot
        self._requests = requests
        self._runner = runner
        self._update_state = update_state
        self._begun_s = time.monotonic()
        self._process = psutil.Process()
        self._peak_rss_bytes: int | None = None
        psutil.cpu_percent()  # the first call only sets the point from which the next one counts

    def sample(self) -> TelemetryMessage:
        """Return a sample of now."""
        memory = psutil.virtual_memory()
        counters = self._requests.counters
        rss_bytes, peak_bytes = self._worker_memory()
        last = counters.last
        return TelemetryMessage(
            time_unix_s=time.time(),
            boot=self._boot,
            uptime_s=time.monotonic() - self._begun_s,
            agent=lamplighter_agent.__version__,
            package=self._runner.package,
            update_state=self._update_state(),
            worker=self._runner.state,
            worker_restarts=self._runner.restarts,
            queue_depth=self._requests.depth,
            requests_active=self._requests.active,
            requests_total=counters.accepted,
            requests_refused=counters.refused,
            requests_failed=counters.failed,
            prompt_tokens_total=counters.prompt_tokens,
            generated_tokens_total=counters.generated_tokens,
            generated_tokens_per_s=last.generated_tokens_per_s if last else None,
            prompt_tokens_per_s=last.prompt_tokens_per_s if last else None,
            time_to_first_token_s=last.first_token_s if last else None,
            worker_rss_bytes=rss_bytes,
            worker_peak_rss_bytes=peak_bytes,
            agent_rss_bytes=self._process.memory_info().rss,
            cpu_percent=psutil.cpu_percent(),
            load_1m=os.getloadavg()[0],
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            disk_free_bytes=_disk_free(self._state_dir),
            temperature_celsius=_temperature(),
            spool_dropped=self.spool_dropped,
        )

    def _worker_memory(self) -> tuple[int | None, int | None]:
        """Return resident and peak memory of the worker; the peak of the last one stays while there is none."""
        worker = self._runner.worker
        pid = worker.pid if worker is not None else None
        if pid is None:
            return None, self._peak_rss_bytes
        sizes: dict[str, int] = {}
        try:
            for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in {"VmRSS", "VmHWM"}:
                    sizes[name] = int(value.split()[0]) * 1024
        except OSError:
            return None, self._peak_rss_bytes  # it has just ended
        self._peak_rss_bytes = sizes.get("VmHWM")
        return sizes.get("VmRSS"), self._peak_rss_bytes


class TelemetryReporter:
    """Takes a sample every interval and brings it to the fleet, in order, late if it must be.

    Args:
        config: The whole configuration.
        sampler: Takes the samples.
        publisher: Takes the messages.

    Raises:
        StoreError: If the spool cannot be used.
    """

    def __init__(self, config: AgentConfig, sampler: Sampler, publisher: Publisher) -> None:
        self._interval_s = config.telemetry.interval_s
        self._sampler = sampler
        self._publisher = publisher
        self._spool = Spool(config.state_dir / SPOOL_NAME, max_bytes=config.telemetry.spool_mb * 1024 * 1024)

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            self.report()
            await asyncio.sleep(self._interval_s)

    def report(self) -> None:
        """Take a sample and send it, or keep it."""
        self._sampler.spool_dropped = self._spool.dropped
        sample = self._sampler.sample()
        if not self._spool and self._publisher.is_connected and self._publisher.publish_telemetry(encode(sample)):
            return
        try:
            self._spool.push(encode(msgspec.structs.replace(sample, historical=True)))
        except StoreError as error:
            logger.warning("a telemetry sample is lost: %s", error.message)

    async def replay(self) -> None:
        """Send what waits, oldest first and slowly, until nothing waits or the broker is away; then a fresh sample."""
        while self._publisher.is_connected and (sample := self._spool.first()) is not None:
            if not self._publisher.publish_telemetry(sample, qos=1):
                return
            self._spool.drop_first()
            await asyncio.sleep(1 / _REPLAY_A_SECOND)
        if self._publisher.is_connected:
            self.report()


def _disk_free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return int(psutil.disk_usage(str(path)).free)


def _temperature() -> float | None:
    """Return the hottest sensor in degrees Celsius, or None where there is none."""
    try:
        sensors = psutil.sensors_temperatures()
    except OSError:
        return None
    return max((reading.current for readings in sensors.values() for reading in readings), default=None)
