"""What an update asks of the service: prepare, try, switch. Called in the updater's thread.

The trial and the switch happen in the event loop; preparing happens in a process of its own, whose memory the system
gets back. Each of them looks at the update's interrupt and ends soon after it is set.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from lamplighter_agent.errors import EngineError, StoreError
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.service.oom import offer_to_the_kernel
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.states import PackageRef
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.2
_UNDO_S: Final = 8.0
_T = TypeVar("_T")


class ServiceHooks:
    """The service as an updater sees it.

    Args:
        store: The packages of this device.
        runner: Tries and switches packages.
        prepare_module: Run as ``python -m MODULE PACKAGE ROOT`` to make the copy for this CPU.
        prepare_timeout_s: Longest time for that.
        prompt_weights: Let the copy have weights for prompts.
    """

    def __init__(
        self,
        store: Store,
        runner: PackageRunner,
        *,
        prepare_module: str,
        prepare_timeout_s: float,
        prompt_weights: bool = False,
    ) -> None:
        self._store = store
        self._runner = runner
        self._prepare_module = prepare_module
        self._prepare_timeout_s = prepare_timeout_s
        self._prompt_weights = prompt_weights
        self._loop = asyncio.get_running_loop()

    def prepare(self, package: Path, manifest: Manifest, interrupt: Interrupt) -> None:
        """Make the copy for this CPU; without room for it, the package is used as built.

        Raises:
            EngineError: If it cannot be made.
            UpdateCancelledError: If the update was cancelled or the agent ends.
            UpdateDeadlineError: If the update's time is over.
        """
        self._in_loop(self._runner.limits.begin_share(), "preparing the package", interrupt)
        try:
            self._prepare(package, manifest, interrupt)
        finally:
            self._loop.call_soon_threadsafe(self._runner.limits.let_go)

    def _prepare(self, package: Path, manifest: Manifest, interrupt: Interrupt) -> None:
        command = [sys.executable, "-m", self._prepare_module, str(package), str(self._store.prepared_dir)]
        if self._prompt_weights:
            command.append("--prompts")
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            offer_to_the_kernel(process.pid)
            output = self._wait_for(process, interrupt)
        if process.returncode == StoreError.exit_code:
            logger.warning("%s is used without a prepared copy: %s", manifest.reference, output)
        elif process.returncode != 0:
            raise EngineError(f"preparing {manifest.reference} ended with status {process.returncode}: {output}")

    def trial(self, package: Path, manifest: Manifest, interrupt: Interrupt) -> TrialMeasurement:
        """Try a package in a worker of its own.

        Raises:
            PackageError: If the package cannot be used here.
            EngineError: If it cannot be loaded or fails.
            UpdateCancelledError: If the update was cancelled or the agent ends.
            UpdateDeadlineError: If the update's time is over.
        """
        return self._in_loop(self._runner.measure(package, manifest), "the trial", interrupt)

    def activate(self, reference: PackageRef, interrupt: Interrupt) -> None:
        """Serve another package.

        Raises:
            PackageError: If the package cannot be used here.
            EngineError: If it cannot be loaded.
            UpdateCancelledError: If the agent ends.
            UpdateDeadlineError: If the update's time is over.
        """
        package = self._store.package(reference)
        self._in_loop(self._runner.switch(package.path, package.manifest), "the switch", interrupt)

    def _wait_for(self, process: subprocess.Popen[bytes], interrupt: Interrupt) -> str:
        waited_s = 0.0
        while True:
            try:
                output, _ = process.communicate(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                waited_s += _POLL_S
                if interrupt.is_set or waited_s > self._prepare_timeout_s:
                    process.kill()
                    process.wait()
                    interrupt.check("preparing the package")
                    raise EngineError(f"preparing the package took more than {self._prepare_timeout_s:g} s") from None
            else:
                lines = output.decode(errors="replace").strip().splitlines()
                return " ".join(lines[-3:])

    def _in_loop(self, work: Coroutine[Any, Any, _T], what: str, interrupt: Interrupt) -> _T:
        tasks: list[asyncio.Task[Any]] = []

        async def carry_out() -> _T:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            return await work

        future = asyncio.run_coroutine_threadsafe(carry_out(), self._loop)
        while True:
            try:
                return future.result(_POLL_S)
            except concurrent.futures.TimeoutError:
                if not interrupt.is_set:
                    continue
            # The task is cancelled, not the future: what it had begun must be undone before this returns.
            for task in tasks:
                self._loop.call_soon_threadsafe(task.cancel)
            done, _ = concurrent.futures.wait({future}, _UNDO_S)
            if not done or future.cancelled():
                interrupt.check(what)
            return future.result()
