"""Parts of the service running in an event loop of their own thread, so that a test may talk to them and wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lamplighter_agent.config import AgentConfig, LocalApiConfig, RequestsConfig
from lamplighter_agent.errors import RequestError
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.commands import Outcome
from lamplighter_agent.service.local_api import LocalApi
from lamplighter_agent.service.local_api_routes import Facts
from lamplighter_agent.service.messages import CommandMessage, DesiredMessage
from lamplighter_agent.service.mqtt_actions import Actions
from lamplighter_agent.service.mqtt_service import MqttService
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.telemetry import Sampler
from lamplighter_agent.service.worker import EngineWorker, WorkerSpec

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T], timeout_s: float = 30.0) -> _T:
        """Run a coroutine there and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class MqttBox:
    """A box on MQTT with a worker, without the rest of the agent."""

    def __init__(self, config: AgentConfig, spec: WorkerSpec, boot: int = 1) -> None:
        self.thread = LoopThread()
        self.desired: list[DesiredMessage] = []
        self.commands: list[CommandMessage] = []
        self.thread.run(self._start(config, spec, boot))

    async def _start(self, config: AgentConfig, spec: WorkerSpec, boot: int) -> None:
        self.worker = EngineWorker(spec)
        await self.worker.start()
        self.requests = RequestQueue(config.requests)
        self.requests.attach(self.worker)
        self._born = asyncio.Event()
        actions = Actions(self._command, self.desired.append, self._born.set, lambda: "fake/1")
        self.service = MqttService(config, self.requests, actions, boot)
        self.service.start()

    async def _command(self, command: CommandMessage) -> Outcome:
        self.commands.append(command)
        if command.command == "rollback":
            raise RequestError("nothing to go back to", code=404)
        if command.command == "cancel_update":
            raise ValueError("a defect")
        return Outcome(f"{command.command} done")

    def wait_until_connected(self) -> None:
        """Wait until the broker has the next birth message; one that was sent before counts."""
        self.thread.run(self._wait_until_connected())

    async def _wait_until_connected(self) -> None:
        await asyncio.wait_for(self._born.wait(), 20)
        self._born.clear()
        connection = self.service.connection
        async with asyncio.timeout(20):
            while connection.connected and (len(connection._outbox) or connection._unacknowledged):  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def close(self) -> None:
        self.thread.run(self._stop())
        self.thread.close()

    async def _stop(self) -> None:
        await self.requests.drain(1.0)
        await self.service.prompts.finish_answers(1.0)
        await self.service.stop()
        await self.worker.stop(0.0)


class ApiBox:
    """The local API with a worker, without the rest of the agent."""

    def __init__(self, config: LocalApiConfig, spec: WorkerSpec | None, queue_size: int = 2) -> None:
        self.thread = LoopThread()
        self.path = config.socket
        try:
            self.thread.run(self._start(config, spec, queue_size))
        except BaseException:
            self.thread.close()
            raise

    async def _start(self, config: LocalApiConfig, spec: WorkerSpec | None, queue_size: int) -> None:
        agent = AgentConfig(requests=RequestsConfig(queue_size=queue_size), state_dir=Path.cwd())
        self.requests = RequestQueue(agent.requests)
        base = spec or WorkerSpec(package=Path())
        self.runner = PackageRunner(base, self.requests, lambda: None)
        sampler = Sampler(agent, 1, self.requests, self.runner, lambda: "idle")
        facts = Facts(
            sampler.sample, lambda: self.runner.package, lambda: self.runner.state, lambda: self.runner.state == "ready"
        )
        self.api = LocalApi(config, self.requests, facts)
        self.api.listen()
        await self.api.start()
        if spec is not None:
            await self.runner.switch(spec.package)

    def wait_until_idle(self) -> None:
        """Wait until nothing waits and nothing is being answered."""
        self.thread.run(self._wait_until_idle())

    async def _wait_until_idle(self) -> None:
        async with asyncio.timeout(10):
            while self.requests.active or self.requests.depth:  # noqa: ASYNC110 (the queue has no event for it)
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.thread.run(self._stop())
        self.thread.close()

    async def _stop(self) -> None:
        await self.requests.drain(1.0)
        await self.api.stop()
        await self.runner.stop(0.0)


@contextmanager
def running_api(config: LocalApiConfig, spec: WorkerSpec | None, queue_size: int = 2) -> Iterator[ApiBox]:
    """An API that is stopped at the end."""
    box = ApiBox(config, spec, queue_size)
    try:
        yield box
    finally:
        box.close()


@contextmanager
def running_box(config: AgentConfig, spec: WorkerSpec, boot: int = 1) -> Iterator[MqttBox]:
    """A box that is stopped at the end."""
    box = MqttBox(config, spec, boot)
    try:
        yield box
    finally:
        box.close()
