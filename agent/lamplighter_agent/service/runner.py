"""Keeps a worker running for the package in use, tries candidates, and switches between packages.

Everything runs in the agent's event loop. Each package is one ``EngineWorker`` after another: when one ends by itself
the next is started, with a growing delay. A switch starts the new package's worker beside the old one and drains the
old one afterwards; where memory holds only one, the old one is stopped first and comes back if the new one fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from lamplighter_agent.engine.events import Finished, TextDelta
from lamplighter_agent.engine.memory import plan_memory, read_machine_memory
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import LamplighterError, MemoryBudgetError, RequestError, WorkerError
from lamplighter_agent.package.manifest import Manifest, SelfTest
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.memory_limits import MemoryLimits
from lamplighter_agent.service.worker import EngineWorker, WorkerSpec
from lamplighter_agent.service.worker_messages import Prompt
from lamplighter_agent.update.trial import TrialMeasurement

logger = logging.getLogger(__name__)

RunnerState = Literal["no_package", "starting", "ready", "restarting", "failed", "switching", "safe_mode"]

_FIRST_DELAY_S: Final = 1.0
_MAX_DELAY_S: Final = 60.0
_STABLE_S: Final = 60.0
_DRAIN_S: Final = 30.0


class PackageRunner:
    """The engine of the agent, as one thing that may be switched and restarted.

    Args:
        spec: What every worker has in common; its ``package`` is replaced.
        requests: Gets each worker that is ready.
        changed: Called when ``state`` or ``package`` has changed.
        limits: Is told what memory is needed.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        requests: RequestQueue,
        changed: Callable[[], None],
        limits: MemoryLimits | None = None,
    ) -> None:
        self.state: RunnerState = "no_package"
        self.package: str | None = None
        self.failure: LamplighterError | None = None
        self.restarts = 0
        self.last_end: str | None = None
        self.limits = limits or MemoryLimits()
        self._spec = spec
        self._requests = requests
        self._changed = changed
        self._path: Path | None = None
        self._worker: EngineWorker | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._switching = asyncio.Lock()
        self._settled = asyncio.Event()
        requests.detach(_no_package())

    @property
    def worker(self) -> EngineWorker | None:
        """The worker in service, or None."""
        return self._worker

    def start(self, package: Path) -> None:
        """Run a package from now on; it is loaded in the background and tried again when that fails."""
        self._path = package
        self._settled.clear()
        self._requests.detach()
        self._supervisor = asyncio.create_task(self._supervise(None), name="worker-supervisor")

    def refuse(self, failure: RequestError) -> None:
        """Run nothing and answer every request with ``failure`` until a package is started or switched to."""
        self.failure = failure
        self._requests.detach(failure)
        self._set("safe_mode")

    @property
    def has_package(self) -> bool:
        """True if there is a package that runs or should run."""
        return self._path is not None

    @property
    def is_watched(self) -> bool:
        """False if an engine should run and nobody mends it: a defect that only a new start mends.

        Its supervisor has ended, or it has been silent for twice the time after which it should have been replaced.
        """
        if self._supervisor is None:
            return True
        silent_s = self._worker.silent_s if self._worker is not None else 0.0
        return not self._supervisor.done() and silent_s < 2 * self._spec.stall_timeout_s

    async def wait_settled(self) -> None:
        """Wait until the first worker is ready, or has failed, or there is no package to start."""
        if self._path is not None:
            await self._settled.wait()

    async def switch(self, package: Path, manifest: Manifest | None = None) -> None:
        """Serve another package; returns when it answers. When this raises, the package before is still served.

        Args:
            package: The new package's directory.
            manifest: Its manifest, to judge whether memory holds both; None takes it that it does.

        Raises:
            PackageError: If the package cannot be used here.
            EngineError: If it cannot be loaded.
        """
        async with self._switching, self.limits.share():
            before = self._path
            stop_first = before is not None and manifest is not None and not _fits(manifest, self._spec.options)
            if stop_first:
                logger.info("memory holds one package only: the old one is stopped first")
                await self._stop_serving("switching")
            worker = EngineWorker(msgspec.structs.replace(self._spec, package=package))
            try:
                await worker.start()
            except BaseException:
                if stop_first and before is not None:
                    self.start(before)
                raise
            old = await self._release()
            self._path = package
            self._supervisor = asyncio.create_task(self._supervise(worker), name="worker-supervisor")
            await self._settled.wait()
            if old is not None:
                self._leave(old)

    async def measure(self, package: Path, manifest: Manifest) -> TrialMeasurement:
        """Try a package in a worker of its own: load it and run the manifest's self-tests.

        Raises:
            PackageError: If the package cannot be used here.
            EngineError: If it cannot be loaded or fails.
        """
        async with self._switching, self.limits.share():
            before = self._path
            stop_first = before is not None and not _fits(manifest, self._spec.options)
            if stop_first:
                await self._stop_serving("switching")
            worker = EngineWorker(msgspec.structs.replace(self._spec, package=package))
            try:
                ready = await worker.start()
                results = [await _self_test(worker, test) for test in manifest.self_tests]
                stats = await worker.stats()
            finally:
                await worker.stop(grace_s=0.0)
                if stop_first and before is not None:
                    self.start(before)
        finals = [final for _, final in results]
        return TrialMeasurement(
            self_test_tokens=tuple(tokens for tokens, _ in results),
            load_s=ready.load_s,
            first_token_s=max((final.timings.first_token_s for final in finals), default=None),
            prefill_tokens_per_s=max((final.timings.prompt_tokens_per_s for final in finals), default=None),
            generated_tokens_per_s=max((final.timings.generated_tokens_per_s for final in finals), default=None),
            peak_rss_bytes=stats.peak_rss_bytes,
        )

    async def restart(self) -> None:
        """Start the engine anew with the same package; requests under way fail and are worth a retry.

        Raises:
            RequestError: If no package is in use.
        """
        async with self._switching:
            if self._path is None:
                raise _no_package()
            path = self._path
            await self._stop_serving("restarting")
            self.start(path)

    async def stop(self, grace_s: float) -> None:
        """End every worker; requests under way get ``grace_s`` to finish."""
        old = await self._release()
        if old is not None:
            self._leave(old, grace_s)
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=grace_s + _DRAIN_S)

    async def _supervise(self, worker: EngineWorker | None) -> None:
        """Keep a worker running; the first one may be there already."""
        failures = 0
        while True:
            worker = worker or await self._try_to_start(failures)
            served = worker is not None
            if worker is not None:
                self._serve(worker)
                begun = time.monotonic()
                await worker.ended.wait()
                await worker.stop()
                self.last_end = worker.end_reason
                self.failure = WorkerError(f"the engine worker was lost: {self.last_end}")
                self._worker = worker = None
                self.limits.serve(None)
                self._requests.detach()
                self.restarts += 1
                self._set("restarting")
                if time.monotonic() - begun >= _STABLE_S:
                    failures = 0
            failures += 1
            if failures > 1 or not served:  # a worker that served comes back at once: one request may have ended it
                await asyncio.sleep(_delay(failures))

    async def _try_to_start(self, failures: int) -> EngineWorker | None:
        assert self._path is not None
        worker = EngineWorker(msgspec.structs.replace(self._spec, package=self._path))
        if self.state != "restarting":
            self._set("starting")
        try:
            async with self.limits.share():
                await worker.start()
        except LamplighterError as error:
            logger.error("the package in %s cannot be started: %s", self._path, error.message)  # noqa: TRY400
            self.failure = error
            self._requests.detach(_failed(error, _delay(failures + 1)))
            self._set("failed")
            self._settled.set()
            return None
        return worker

    def _serve(self, worker: EngineWorker) -> None:
        self._worker = worker
        self.failure = None
        self.package = worker.ready.package if worker.ready else None
        self.limits.serve(worker.ready.plan if worker.ready else None)
        self._requests.attach(worker)
        self._set("ready")
        self._settled.set()

    async def _release(self) -> EngineWorker | None:
        """Stop supervising and return the worker in service, which goes on."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        self._settled.clear()
        worker, self._worker = self._worker, None
        return worker

    async def _stop_serving(self, state: RunnerState) -> None:
        self._requests.detach()
        self._set(state)
        worker = await self._release()
        self.limits.serve(None)
        if worker is not None:
            await worker.stop(_DRAIN_S if state == "switching" else 0.0)

    def _leave(self, worker: EngineWorker, grace_s: float = _DRAIN_S) -> None:
        task = asyncio.create_task(worker.stop(grace_s), name="worker-leaving")
        self._leaving.add(task)
        self.limits.hold_share()
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._leaving.discard(task)
        self.limits.let_go()

    def _set(self, state: RunnerState) -> None:
        self.state = state
        self._changed()


async def _self_test(worker: EngineWorker, test: SelfTest) -> tuple[tuple[int, ...], Finished]:
    params = GenerationParams(
        max_tokens=len(test.expected_tokens), temperature=0.0, repetition_penalty=1.0, ignore_eos=True
    )
    tokens: list[int] = []
    async with contextlib.aclosing(worker.generate("self-test", Prompt(tokens=test.prompt_tokens), params)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                tokens += event.token_ids
            else:
                return tuple(tokens), event
    raise WorkerError("a self-test ended without a result")


def _fits(manifest: Manifest, options: EngineOptions) -> bool:
    """Tell whether another worker fits beside the one that runs: whether there is a memory plan for what is free."""
    free = msgspec.structs.replace(read_machine_memory(), process_bytes=0)
    try:
        plan_memory(manifest, free, options)
    except MemoryBudgetError:
        return False
    return True


def _delay(failures: int) -> float:
    cap = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(failures, 16))
    return random.uniform(cap / 2, cap)  # noqa: S311 (spreads load, guards nothing)


def _no_package() -> RequestError:
    return RequestError(
        "no package is installed on this device", code=503, hint="push one with lamplighter-fleet push NAME/VERSION"
    )


def _failed(error: LamplighterError, retry_after_s: float) -> RequestError:
    return RequestError(
        f"the package cannot be started: {error.message}", code=503, retry_after_s=retry_after_s, hint=error.hint
    )
