"""What the fleet may ask an agent to do once, by command."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

import lamplighter_agent
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import RequestError
from lamplighter_agent.service import diagnostics
from lamplighter_agent.service.messages import CommandMessage
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.telemetry import Sampler
from lamplighter_agent.service.updates import UpdateService
from lamplighter_agent.update.store import Store

logger = logging.getLogger(__name__)

IDENTIFY_S: Final = 60.0


class Outcome(NamedTuple):
    """What came of a command: a sentence, and what it found."""

    message: str
    data: dict[str, object] | None = None


class Links(NamedTuple):
    """What commands need of the agent as a whole.

    Attributes:
        describe: Gives its state as one line.
        report: Publishes status, reported and telemetry again.
        start_package: Starts the package in use although the agent is in safe mode.
        log: Holds the last lines of the log.
    """

    describe: Callable[[], str]
    report: Callable[[], None]
    start_package: Callable[[], Awaitable[None]]
    log: diagnostics.LogMemory


class Commands:
    """Carries commands out.

    Args:
        config: The whole configuration.
        store: The packages of this device.
        runner: The engine.
        updates: Rolls back.
        sampler: Takes samples.
        links: The rest of the agent.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        runner: PackageRunner,
        updates: UpdateService,
        sampler: Sampler,
        links: Links,
    ) -> None:
        self._config = config
        self._store = store
        self._runner = runner
        self._updates = updates
        self._sampler = sampler
        self._links = links
        self._identify_until_s = 0.0

    @property
    def identifies(self) -> bool:
        """True while the chat page shall show that this is the box that somebody looks for."""
        return time.monotonic() < self._identify_until_s

    async def run(self, command: CommandMessage) -> Outcome:
        """Carry a command out.

        Raises:
            LamplighterError: If it cannot be done.
        """
        match command.command:
            case "ping":
                return Outcome(f"lamplighter-agent {lamplighter_agent.__version__}: {self._links.describe()}")
            case "identify":
                return self._identify()
            case "report":
                self._links.report()
                return Outcome("status, reported and telemetry were sent again")
            case "restart_worker":
                await self._restart_worker()
                return Outcome("the engine is starting anew")
            case "rollback":
                return Outcome(await self._updates.rollback("mqtt"))
            case "cancel_update":
                return Outcome(self._updates.cancel("mqtt"))
            case "clear_caches":
                return await self._clear_caches()
            case "set_log_level":
                assert command.level is not None
                logging.getLogger().setLevel(command.level.upper())
                logger.warning("the log level is %s until the agent's next start", command.level)
                return Outcome(f"the log level is {command.level} until the agent's next start")
            case "collect_diagnostics":
                return await self._collect()

    def _identify(self) -> Outcome:
        self._identify_until_s = time.monotonic() + IDENTIFY_S
        logger.warning("identify: this is %s", self._config.device.id)
        return Outcome(f"{self._config.device.id} shows itself for {IDENTIFY_S:.0f} s", diagnostics.identity())

    async def _restart_worker(self) -> None:
        if self._runner.state == "safe_mode" and not self._runner.has_package:
            await self._links.start_package()
        else:
            await self._runner.restart()

    async def _clear_caches(self) -> Outcome:
        worker = self._runner.worker
        if worker is None:
            raise RequestError("no engine runs", code=503, retry_after_s=2.0)
        freed_bytes = (await worker.clear_caches()).freed_bytes
        return Outcome(f"forgot {freed_bytes} bytes of prefixes", {"freed_bytes": freed_bytes})

    async def _collect(self) -> Outcome:
        installed = await asyncio.to_thread(self._store.installed)
        sample = await self._sampler.sample()
        ready = self._runner.worker.ready if self._runner.worker is not None else None
        report = self._updates.last_report
        data: dict[str, object] = {
            "state": self._links.describe(),
            "identity": diagnostics.identity(),
            "settings": diagnostics.settings(self._config),
            "sample": msgspec.to_builtins(sample),
            "installed": [str(reference) for reference in installed],
            "worker": None if ready is None else msgspec.to_builtins(ready),
            "failure": None if self._runner.failure is None else self._runner.failure.to_dict(),
            "update": None if report is None else msgspec.to_builtins(report),
            "log": self._links.log.tail(),
        }
        return Outcome("collected", data)
