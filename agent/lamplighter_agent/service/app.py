"""The agent as a process: what is started, in which order, what runs, and how all of it ends.

Three phases: start up, run until a signal sets a flag, shut down. Every wait of the shutdown has a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import Final, NamedTuple

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import RequestError, StoreError
from lamplighter_agent.package.durable import make_directory, storage_errors, write_file
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.commands import Commands, Links
from lamplighter_agent.service.diagnostics import LogMemory
from lamplighter_agent.service.liveness import Liveness
from lamplighter_agent.service.local_api import LocalApi
from lamplighter_agent.service.local_api_routes import Facts
from lamplighter_agent.service.memory_limits import MemoryLimits
from lamplighter_agent.service.memory_view import MemoryReport, engine_options, memory_report
from lamplighter_agent.service.mqtt_actions import Actions
from lamplighter_agent.service.mqtt_service import MqttService
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.starts import FORGIVEN_AFTER_S, StartCounter
from lamplighter_agent.service.systemd import ServiceManager, passed_sockets
from lamplighter_agent.service.telemetry import Sampler, TelemetryReporter
from lamplighter_agent.service.updates import PREPARE_MODULE, UpdateService
from lamplighter_agent.service.worker import DEFAULT_ENGINE, WorkerSpec
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.probation import ProbationRules
from lamplighter_agent.update.states import UpdateReport, UpdateState
from lamplighter_agent.update.store import Store

logger = logging.getLogger(__name__)

BOOT_NAME: Final = "boot"
PREFIXES_NAME: Final = "prefixes"
_MIB: Final = 1024 * 1024
DRAIN_S: Final = 10.0
_TICK_S: Final = 5.0
_WATCHDOG_S: Final = 60.0
_EXTEND_S: Final = 30.0


class EngineModules(NamedTuple):
    """What child processes run; tests put small ones in their place.

    Attributes:
        load: ``module:function`` that loads the engine in the worker process.
        prepare: Module that makes the copy of a package for this CPU.
    """

    load: str = DEFAULT_ENGINE
    prepare: str = PREPARE_MODULE


REAL_ENGINE: Final = EngineModules()


def run(config: AgentConfig, *, engine: EngineModules = REAL_ENGINE) -> int:
    """Run the agent until SIGTERM or SIGINT.

    Args:
        config: The whole configuration.
        engine: What loads and prepares packages.

    Returns:
        The exit status.

    Raises:
        LamplighterError: If it cannot start.
    """
    asyncio.run(_run(config, engine))
    return 0


async def _run(config: AgentConfig, engine: EngineModules) -> None:
    await Agent(config, ServiceManager.from_environment(), engine=engine).run()


class Agent:
    """The service; it is made inside a running event loop and runs once.

    Args:
        config: The whole configuration.
        manager: The service manager to tell.
        engine: What loads and prepares packages.

    Raises:
        ConfigError: If a password, certificate or name cannot be used.
        StoreError: If the state directory cannot be written.
    """

    def __init__(self, config: AgentConfig, manager: ServiceManager, *, engine: EngineModules = REAL_ENGINE) -> None:
        self._config = config
        self._manager = manager
        self._tasks: list[asyncio.Task[None]] = []
        self._store = Store(config.state_dir, reserve_bytes=config.repository.disk_reserve_bytes)
        boot = _count_boot(config.state_dir)
        self._starts = StartCounter(config.state_dir)
        rules = ProbationRules(seconds=config.updates.probation_s, max_failures=config.updates.probation_failures)
        ledger = Ledger.open(config.state_dir, rules)
        self._requests = RequestQueue(config.requests)
        self._runner = PackageRunner(
            _spec(config, self._store, engine), self._requests, self._on_change, MemoryLimits.from_environment()
        )
        self._updates = UpdateService(
            config, self._store, ledger, self._runner, self._on_report, prepare_module=engine.prepare
        )
        self._seen_restarts = 0
        self._told: tuple[str, UpdateState] | None = None
        self._sampler = Sampler(config, boot, self._requests, self._runner, lambda: self._updates.state)
        self._api: LocalApi | None = None
        self._mqtt: MqttService | None = None
        self._telemetry: TelemetryReporter | None = None
        self._log = LogMemory()
        links = Links(self._describe, self._report_again, self._start_package_in_use, self._log)
        self._commands = Commands(config, self._store, self._runner, self._updates, self._sampler, links)
        if config.mqtt.enabled:
            actions = Actions(
                self._commands.run,
                self._updates.request,
                self._on_connected,
                lambda: self._runner.package,
                lambda: "safe_mode" if self._runner.state == "safe_mode" else None,
            )
            self._mqtt = MqttService(config, self._requests, actions, boot)
            self._sampler.connection = self._mqtt
            self._telemetry = TelemetryReporter(config, self._sampler, self._mqtt)
        if config.local_api.socket is not None or config.local_api.tcp_port is not None:
            facts = facts_of(self._sampler, self._runner)._replace(identifies=lambda: self._commands.identifies)
            self._api = LocalApi(config.local_api, self._requests, facts)
        self._liveness = Liveness(config.state_dir, self._mqtt, lambda: self._runner.is_watched)

    async def run(self) -> None:
        """Start up, run, shut down.

        Raises:
            LamplighterError: If it cannot start; whatever was started has ended then.
        """
        stop = stop_on_signals()
        logging.getLogger().addHandler(self._log)
        try:
            await self._start_up(stop)
            await self._main_loop(stop)
            self._forgive()
        finally:
            self._manager.stopping()
            await self._shut_down()
            logging.getLogger().removeHandler(self._log)

    async def _start_up(self, stop: asyncio.Event) -> None:
        if self._api is not None:
            self._api.listen(passed_sockets())
        await self._start_package()
        if self._api is not None:
            await self._api.start()  # who connected meanwhile has waited, and waits on in the queue
        if self._mqtt is not None and self._telemetry is not None:
            self._mqtt.start()
            self._tasks.append(asyncio.create_task(self._telemetry.run(), name="telemetry"))
        await self._wait_for_package(stop)
        # Only now: an update would compete with the start for memory, and it may want to switch.
        self._updates.start()
        self._manager.ready(self._describe())

    async def _wait_for_package(self, stop: asyncio.Event) -> None:
        """Wait until the package's first start is over, asking the service manager for time meanwhile."""
        settled = asyncio.create_task(self._runner.wait_settled(), name="wait-for-package")
        stopped = asyncio.create_task(stop.wait(), name="wait-for-stop")
        try:
            while not settled.done() and not stopped.done():
                self._manager.extend_timeout(_EXTEND_S)
                await asyncio.wait({settled, stopped}, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            settled.cancel()
            stopped.cancel()

    async def _main_loop(self, stop: asyncio.Event) -> None:
        watchdog_s = self._manager.watchdog_s or _WATCHDOG_S
        tick_s = min(_TICK_S, watchdog_s / 3)
        ready_s = 0.0
        while not stop.is_set():
            if fault := self._liveness.fault(watchdog_s / 2):
                logger.error("%s; the watchdog is not fed", fault)
            else:
                self._manager.alive()
            if self._api is not None:
                await self._api.keep_reachable()
            begun = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), tick_s)
            if self._runner.state == "ready" or self._starts.mode != "safe_mode":
                before, ready_s = ready_s, ready_s + time.monotonic() - begun
                if before < FORGIVEN_AFTER_S <= ready_s:
                    self._forgive()
            if self._runner.state == "ready":
                self._updates.engine_served(time.monotonic() - begun)

    def _forgive(self) -> None:
        try:
            self._starts.forgive()
        except StoreError as error:
            logger.warning("the next start will count as one after a failure: %s", error.message)

    async def _shut_down(self) -> None:
        logger.info("stopping")
        self._requests.close(stopping())
        await self._updates.stop()
        await self._requests.drain(DRAIN_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._mqtt is not None:
            await self._mqtt.prompts.finish_answers(1.0)
            await self._mqtt.stop()
        if self._api is not None:
            await self._api.stop()
        await self._runner.stop(0.0)
        await self._liveness.stop()

    async def _start_package(self) -> None:
        mode = self._starts.mode
        if mode == "safe_mode":
            self._refuse_to_start()
            return
        await self._start_package_in_use(unstable=mode == "previous_package")

    async def _start_package_in_use(self, *, unstable: bool = False) -> None:
        package = await self._updates.start_up(unstable=unstable)
        if package is None:
            logger.info("no package is in use; push one with lamplighter-fleet push NAME/VERSION")
        else:
            self._runner.start(package.path)

    def _refuse_to_start(self) -> None:
        self._runner.refuse(
            RequestError(
                f"safe mode: the agent ended early {self._starts.short_lived} times in a row, so no package is started",
                code=503,
                hint="see its log; push another package, send the command restart_worker, or restart the service",
            )
        )

    def _describe(self) -> str:
        package = self._runner.package or "no package"
        broker = "no broker configured"
        if self._mqtt is not None:
            broker = "broker connected" if self._mqtt.is_connected else "broker away"
        text = f"{package}, engine {self._runner.state}, {broker}, update {self._updates.state}"
        return text if self._runner.failure is None else f"{text}: {self._runner.failure.message}"

    def _on_change(self) -> None:
        """The engine's state changed."""
        self._watch_engine()
        self._manager.status(self._describe())
        if self._mqtt is not None:
            self._mqtt.publish_status()
            self._mqtt.publish_event(f"engine_{self._runner.state}", self._describe())

    def _watch_engine(self) -> None:
        """Tell the updates what speaks against the package in use."""
        if self._runner.restarts > self._seen_restarts:
            self._seen_restarts = self._runner.restarts
            self._updates.engine_failed("the engine's worker ended by itself", never_ready=False)
        elif self._runner.state == "failed" and self._runner.failure is not None:
            self._updates.engine_failed(self._runner.failure.message, never_ready=True)

    def _on_report(self, report: UpdateReport) -> None:
        self._manager.status(self._describe())
        if self._mqtt is None:
            return
        self._mqtt.publish_reported(report)
        state = (report.id, report.state)
        if state != self._told:  # progress is no event
            self._told = state
            said = f": {report.reason}: {report.message}" if report.reason else ""
            self._mqtt.publish_event(f"update_{report.state.value}", f"{report.package}/{report.version}{said}")

    def _on_connected(self) -> None:
        self._manager.status(self._describe())
        if self._mqtt is None or self._telemetry is None:
            return
        if self._updates.last_report is not None:
            self._mqtt.publish_reported(self._updates.last_report)
        replay = asyncio.create_task(self._telemetry.replay(), name="telemetry-replay")
        self._tasks.append(replay)
        replay.add_done_callback(self._tasks.remove)

    def _report_again(self) -> None:
        self._on_connected()
        if self._mqtt is not None:
            self._mqtt.publish_status()


def stop_on_signals() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def facts_of(sampler: Sampler, runner: PackageRunner) -> Facts:
    """Return what the local API tells."""

    def memory() -> MemoryReport | None:
        worker = runner.worker
        if worker is None or worker.ready is None:
            return None
        return memory_report(worker.ready.plan, worker.pid)

    return Facts(
        sampler.sample, lambda: runner.package, lambda: runner.state, lambda: runner.state == "ready", memory=memory
    )


def stopping() -> RequestError:
    """Return the refusal of a process that ends."""
    return RequestError("the agent is stopping", code=503, retry_after_s=5.0, hint="try again in a moment")


def _spec(config: AgentConfig, store: Store, engine: EngineModules) -> WorkerSpec:
    return WorkerSpec(
        package=Path(),
        prepared_root=store.prepared_dir,
        prefix_root=config.state_dir / PREFIXES_NAME,
        options=engine_options(config.engine),
        engine=engine.load,
        start_timeout_s=config.engine.start_timeout_s,
        stall_timeout_s=config.engine.stall_timeout_s,
        log_level=config.log.numeric_level,
    )


def _count_boot(state_dir: Path) -> int:
    """Count this start and return the number, which tells a late will from the present one.

    Raises:
        StoreError: If the state directory cannot be written.
    """
    path = state_dir / BOOT_NAME
    with storage_errors(f"counting the start in {path}"):
        make_directory(state_dir)
        text = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else "0"
        boot = (int(text) if text.isdigit() else int(time.time())) + 1
        write_file(path, str(boot).encode())
    return boot
