"""Samples of the device's condition: taken here, sent on MQTT, kept on disk while the broker is away."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypedDict

import msgspec
import psutil

import lamplighter_agent
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.engine.memory import read_machine_memory
from lamplighter_agent.errors import LamplighterError, StoreError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.machine import Throttling, read_pressure
from lamplighter_agent.service.message_codec import encode_telemetry
from lamplighter_agent.service.messages import TelemetryMessage
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.spool import Spool
from lamplighter_agent.service.worker_messages import CacheUse

logger = logging.getLogger(__name__)

SPOOL_NAME: Final = "spool"
_REPLAY_A_SECOND: Final = 20
_WORKER_PATIENCE_S: Final = 1.0


class _Machine(TypedDict):
    """The part of a sample that has nothing to do with prompts; see ``TelemetryMessage``."""

    agent_rss_bytes: int
    agent_cpu_percent: float
    cpu_percent: float
    load_1m: float
    cpu_pressure_percent: float | None
    memory_total_bytes: int
    memory_available_bytes: int
    memory_limit_bytes: int | None
    memory_pressure_percent: float | None
    memory_stall_percent: float | None
    io_pressure_percent: float | None
    swap_used_bytes: int
    disk_free_bytes: int
    disk_total_bytes: int
    network_sent_bytes: int
    network_received_bytes: int
    device_uptime_s: float
    temperature_celsius: float | None
    throttled: bool | None
    cpu_frequency_mhz: float | None


class Publisher(Protocol):
    """Where samples go."""

    @property
    def is_connected(self) -> bool:
        """True while messages can leave the device."""

    def publish_telemetry(self, sample: bytes, *, qos: int = 0) -> bool:
        """Publish a sample; False if it was not taken."""


class Connection(Protocol):
    """What is counted about the broker."""

    @property
    def connections(self) -> int:
        """Connections since the agent's start."""

    @property
    def dropped(self) -> int:
        """Messages that found no room or no connection."""


class Sampler:
    """Looks at the machine, the worker and the counters.

    Args:
        config: The whole configuration.
        boot: Starts of the agent so far.
        requests: Its counters are read.
        runner: Its worker is asked.
        update_state: Gives the state of the update.

    Attributes:
        connection: The broker's, when there is one.
        spool_dropped: Samples lost because the spool was full; ``spool_waiting`` wait in it.
    """

    def __init__(
        self,
        config: AgentConfig,
        boot: int,
        requests: RequestQueue,
        runner: PackageRunner,
        update_state: Callable[[], str],
    ) -> None:
        self.connection: Connection | None = None
        self.spool_dropped = 0
        self.spool_waiting = 0
        self._state_dir = config.state_dir
        self._boot = boot
        self._requests = requests
        self._runner = runner
        self._update_state = update_state
        self._begun_s = time.monotonic()
        self._process = psutil.Process()
        self._throttling = Throttling()
        self._peak_rss_bytes: int | None = None
        self._caches: CacheUse | None = None
        psutil.cpu_percent()  # the first call only sets the point from which the next one counts
        self._process.cpu_percent()

    async def sample(self) -> TelemetryMessage:
        """Return a sample of now; the worker gets a moment to tell about its caches."""
        await self._ask_worker()
        counters = self._requests.counters
        rss_bytes, peak_bytes = self._worker_memory()
        last = counters.last
        sample = TelemetryMessage(
            time_unix_s=time.time(),
            boot=self._boot,
            uptime_s=time.monotonic() - self._begun_s,
            agent=lamplighter_agent.__version__,
            package=self._runner.package,
            update_state=self._update_state(),
            worker=self._runner.state,
            worker_restarts=self._runner.restarts,
            worker_silent_s=self._runner.worker.silent_s if self._runner.worker else None,
            worker_last_end=self._runner.last_end,
            queue_depth=self._requests.depth,
            requests_active=self._requests.active,
            requests_total=counters.accepted,
            requests_refused=counters.refused,
            requests_failed=counters.failed,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            generated_tokens_total=counters.generated_tokens,
            generated_tokens_per_s=last.generated_tokens_per_s if last else None,
            prompt_tokens_per_s=last.prompt_tokens_per_s if last else None,
            time_to_first_token_s=last.first_token_s if last else None,
            first_token=counters.first_token.snapshot(),
            token=counters.token.snapshot(),
            queue_wait=counters.queue_wait.snapshot(),
            worker_rss_bytes=rss_bytes,
            worker_peak_rss_bytes=peak_bytes,
            broker_connections=self.connection.connections if self.connection else 0,
            messages_dropped=self.connection.dropped if self.connection else 0,
            spool_dropped=self.spool_dropped,
            spool_waiting=self.spool_waiting,
            **self._machine(),
        )
        if self._caches is None:
            return sample
        return msgspec.structs.replace(
            sample,
            kv_used_tokens=self._caches.kv_used_tokens,
            kv_capacity_tokens=self._caches.kv_capacity_tokens,
            prefix_cache_bytes=self._caches.prefix_bytes,
        )

    def _machine(self) -> _Machine:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(_existing(self._state_dir)))
        sent, received = _network_bytes()
        memory_pressure = read_pressure("memory")
        return _Machine(
            agent_rss_bytes=self._process.memory_info().rss,
            agent_cpu_percent=self._process.cpu_percent(),
            cpu_percent=psutil.cpu_percent(),
            load_1m=os.getloadavg()[0],
            cpu_pressure_percent=read_pressure("cpu").some_percent,
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            memory_limit_bytes=read_machine_memory().limit_bytes,
            memory_pressure_percent=memory_pressure.some_percent,
            memory_stall_percent=memory_pressure.full_percent,
            io_pressure_percent=read_pressure("io").some_percent,
            swap_used_bytes=psutil.swap_memory().used,
            disk_free_bytes=disk.free,
            disk_total_bytes=disk.total,
            network_sent_bytes=sent,
            network_received_bytes=received,
            device_uptime_s=time.time() - psutil.boot_time(),
            temperature_celsius=_temperature(),
            throttled=self._throttling.seen(),
            cpu_frequency_mhz=_frequency_mhz(),
        )

    async def _ask_worker(self) -> None:
        worker = self._runner.worker
        if worker is None or worker.state != "ready":
            self._caches = None
            return
        try:
            self._caches = (await asyncio.wait_for(worker.stats(), _WORKER_PATIENCE_S)).caches
        except (TimeoutError, LamplighterError) as error:
            logger.debug("the worker did not tell about its caches: %s", error)  # it is busy, or ending: as before

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
    """Takes a sample every interval and brings samples to the fleet, in order, late if it must be.

    Args:
        config: The whole configuration.
        sampler: Takes the samples.
        publisher: Takes the messages.

    Raises:
        StoreError: If the spool cannot be used.
    """

    def __init__(self, config: AgentConfig, sampler: Sampler, publisher: Publisher) -> None:
        self._interval_s = config.telemetry.interval_s
        self._batch_size = config.telemetry.batch_size
        self._batch: list[TelemetryMessage] = []
        self._sampler = sampler
        self._publisher = publisher
        self._spool = Spool(config.state_dir / SPOOL_NAME, max_bytes=config.telemetry.spool_mb * 1024 * 1024)

    async def run(self) -> None:
        """Report until cancelled; what was sampled and not sent yet goes into the spool then."""
        try:
            while True:
                try:
                    await self.report()
                except Exception:  # a boundary: one sample that cannot be taken must not be the last one
                    logger.exception("a sample of telemetry could not be taken")
                await asyncio.sleep(self._interval_s)
        finally:
            self._keep()

    async def report(self) -> None:
        """Take a sample; send it, or keep it, when the batch is full."""
        self._sampler.spool_dropped = self._spool.dropped
        self._sampler.spool_waiting = len(self._spool)
        self._batch.append(await self._sampler.sample())
        if len(self._batch) >= self._batch_size:
            self._send()

    def _send(self) -> None:
        message = encode_telemetry(self._batch)
        if not self._spool and self._publisher.is_connected and self._publisher.publish_telemetry(message):
            self._batch.clear()
        else:
            self._keep()

    def _keep(self) -> None:
        if not self._batch:
            return
        late = [msgspec.structs.replace(sample, historical=True) for sample in self._batch]
        self._batch.clear()
        try:
            self._spool.push(encode_telemetry(late))
        except StoreError as error:
            logger.warning("telemetry is lost: %s", error.message)

    async def replay(self) -> None:
        """Send what waits, oldest first and slowly, until nothing waits or the broker is away; then a fresh sample."""
        while self._publisher.is_connected and (message := self._spool.first()) is not None:
            if not self._publisher.publish_telemetry(message, qos=1):
                return
            self._spool.drop_first()
            await asyncio.sleep(1 / _REPLAY_A_SECOND)
        if self._publisher.is_connected:
            self._batch.append(await self._sampler.sample())
            self._send()


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _network_bytes() -> tuple[int, int]:
    """Return bytes sent and received by all interfaces but the loopback since the machine's start."""
    counters = [counter for name, counter in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return sum(each.bytes_sent for each in counters), sum(each.bytes_recv for each in counters)


def _frequency_mhz() -> float | None:
    """Return the mean frequency of the cores, or None where it is not told."""
    try:
        cores = psutil.cpu_freq(percpu=True)
    except (OSError, NotImplementedError):
        return None
    return sum(core.current for core in cores) / len(cores) if cores else None


def _temperature() -> float | None:
    """Return the hottest sensor in degrees Celsius, or None where there is none."""
    try:
        sensors = psutil.sensors_temperatures()
    except OSError:
        return None
    return max((reading.current for readings in sensors.values() for reading in readings), default=None)
