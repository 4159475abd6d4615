"""The updater in a thread of its own, joined to the event loop: what is desired goes in, reports come out.

The updater is synchronous and slow (downloads, hashes, fsync). Its hooks reach back into the event loop for the trial
and the switch, and start a process of its own for preparing, whose memory the system gets back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.metadata
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import lamplighter_agent
from lamplighter_agent.config import AgentConfig, RepositoryConfig
from lamplighter_agent.errors import (
    ConfigError,
    EngineError,
    LamplighterError,
    RequestError,
    StoreError,
    UpdateCancelledError,
)
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.update.compatibility import DeviceFacts
from lamplighter_agent.update.downloader import DownloadOptions, HttpSource
from lamplighter_agent.update.sources import Source
from lamplighter_agent.update.states import Desired, PackageRef, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement
from lamplighter_agent.update.updater import UpdateHooks, UpdateOptions, Updater

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 4
PREPARE_MODULE: Final = "lamplighter_agent.engine.prepare"
_MIB: Final = 1024 * 1024
_POLL_S: Final = 0.2
_STOP_TIMEOUT_S: Final = 15.0
_T = TypeVar("_T")


def make_updater(config: AgentConfig, store: Store, hooks: UpdateHooks, *, source: Source | None = None) -> Updater:
    """Return an updater for the configured repository.

    Args:
        config: The whole configuration.
        store: The packages of this device.
        hooks: The rest of the agent.
        source: Another place to read the repository from, such as a USB stick; None: ``repository.url``.

    Raises:
        ConfigError: If the repository's URL or the trusted root is not configured or cannot be read.
    """
    repository = config.repository
    if source is None:
        if repository.url is None:
            raise ConfigError("repository.url is not set", hint="set it to where packages are published")
        source = HttpSource(
            repository.url,
            timeout_s=repository.connect_timeout_s,
            ca_file=repository.ca_file,
            proxy=repository.proxy,
        )
    budget_mb = config.engine.memory_budget_mb
    device = DeviceFacts(
        agent_version=lamplighter_agent.__version__,
        onnxruntime_version=importlib.metadata.version("onnxruntime"),  # from its metadata: it is not imported here
        memory_bytes=None if budget_mb is None else budget_mb * _MIB,
    )
    return Updater(store, source, root=_read_root(repository), device=device, hooks=hooks, options=_options(repository))


class UpdateService:
    """Carries out what the fleet desires, one update at a time; a newer wish ends an older one.

    Args:
        config: The whole configuration.
        store: The packages of this device.
        runner: Tries and switches packages.
        report: Called in the event loop with every report.
        prepare_module: Run as ``python -m MODULE PACKAGE ROOT`` to make the copy for this CPU.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        runner: PackageRunner,
        report: Callable[[UpdateReport], None],
        *,
        prepare_module: str = PREPARE_MODULE,
    ) -> None:
        self.last_report: UpdateReport | None = None
        self._config = config
        self._store = store
        self._runner = runner
        self._tell = report
        self._prepare_module = prepare_module
        self._updater: Updater | None = None
        self._refusal: ConfigError | None = None
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._wanted: Desired | None = None
        self._at_work: Desired | None = None
        self._rollbacks: list[concurrent.futures.Future[str]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)

    @property
    def state(self) -> str:
        """State of the last update, ``idle`` before the first."""
        return self.last_report.state.value if self.last_report is not None else "idle"

    def start(self) -> None:
        """Go on with an update that a restart cut off, and wait for wishes."""
        hooks = UpdateHooks(
            prepare=self._prepare, trial=self._trial, activate=self._activate, report=self._report_from_thread
        )
        try:
            self._updater = make_updater(self._config, self._store, hooks)
        except ConfigError as error:
            logger.info("updates are off: %s", error.message)
            self._refusal = error
            return
        self._thread.start()

    def request(self, desired: Desired) -> None:
        """Make the wanted package the one in use, as soon as possible."""
        if self._refusal is not None:
            self._report(_rejection(desired, self._refusal, self._runner.package))
            return
        with self._condition:
            if desired == self._at_work:
                return  # told again by a new connection
            self._wanted = desired
            if self._at_work is not None and self._updater is not None:
                self._updater.cancel()
            self._condition.notify()

    async def rollback(self) -> str:
        """Switch back to the previous package and return a sentence.

        Raises:
            LamplighterError: If there is none, it is damaged, or the service could not switch.
        """
        if self._updater is None:
            raise RequestError("updates are not configured on this device", code=404)
        future: concurrent.futures.Future[str] = concurrent.futures.Future()
        with self._condition:
            if len(self._rollbacks) >= MAX_WAITING:
                raise RequestError("rollbacks are waiting already", code=429, retry_after_s=10.0)
            self._rollbacks.append(future)
            self._condition.notify()
        return await asyncio.wrap_future(future)

    async def stop(self) -> None:
        """End the update at work at its next step; it goes on after the next start."""
        self._stopping.set()
        if self._updater is None:
            return
        self._updater.suspend()
        with self._condition:
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the update at work did not stop in time; it goes on after the next start")

    # Everything below runs in the updater's thread.

    def _run(self) -> None:
        assert self._updater is not None
        self._guarded(self._updater.resume)
        while not self._stopping.is_set():
            with self._condition:
                if self._wanted is None and not self._rollbacks:
                    self._condition.wait(self._config.repository.check_interval_s)
                rollback = self._rollbacks.pop(0) if self._rollbacks else None
                desired, self._wanted = (None, self._wanted) if rollback else (self._wanted, None)
                self._at_work = desired
            if self._stopping.is_set():
                return
            if rollback is not None:
                self._roll_back(rollback)
            elif desired is not None:
                self._guarded(lambda wanted=desired: self._apply(wanted))  # type: ignore[misc]
            else:
                self._guarded(self._updater.resume)

    def _apply(self, desired: Desired) -> None:
        assert self._updater is not None
        try:
            self._updater.apply(desired)
        except StoreError as error:
            self._report_from_thread(_rejection(desired, error, self._runner.package, UpdateState.FAILED))
        finally:
            with self._condition:
                self._at_work = None

    def _roll_back(self, future: concurrent.futures.Future[str]) -> None:
        assert self._updater is not None
        try:
            outcome = self._updater.rollback()
        except LamplighterError as error:
            future.set_exception(error)
        except Exception as error:  # the thread's boundary: who asked must get an answer
            logger.exception("the rollback failed")
            future.set_exception(EngineError(f"the rollback failed: {type(error).__name__}: {error}"))
        else:
            future.set_result(outcome.report.message or "rolled back")

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except LamplighterError as error:
            logger.warning("the update ended: %s", error.message)
        except Exception:  # the thread's boundary: the next update gets its chance
            logger.exception("the updater failed")

    def _prepare(self, package: Path, manifest: Manifest) -> None:
        """Make the copy for this CPU in a process of its own; without room for it, the package is used as built."""
        command = [
            sys.executable,
            "-m",
            self._prepare_module,
            str(package),
            str(self._store.prepared_dir),
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            output = self._wait_for(process)
        if process.returncode == StoreError.exit_code:
            logger.warning("%s is used without a prepared copy: %s", manifest.reference, output)
        elif process.returncode != 0:
            raise EngineError(f"preparing {manifest.reference} ended with status {process.returncode}: {output}")

    def _wait_for(self, process: subprocess.Popen[bytes]) -> str:
        waited_s = 0.0
        while True:
            try:
                output, _ = process.communicate(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                waited_s += _POLL_S
                if self._stopping.is_set() or waited_s > self._config.engine.start_timeout_s:
                    process.kill()
                    process.wait()
                    raise self._interruption("preparing the package") from None
            else:
                lines = output.decode(errors="replace").strip().splitlines()
                return " ".join(lines[-3:])

    def _trial(self, package: Path, manifest: Manifest) -> TrialMeasurement:
        return self._in_loop(self._runner.measure(package, manifest), "the trial")

    def _activate(self, reference: PackageRef) -> None:
        package = self._store.package(reference)
        self._in_loop(self._runner.switch(package.path, package.manifest), "the switch")

    def _in_loop(self, work: Coroutine[Any, Any, _T], what: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(_POLL_S)
            except concurrent.futures.TimeoutError:
                if self._stopping.is_set():
                    future.cancel()
                    raise self._interruption(what) from None

    def _interruption(self, what: str) -> LamplighterError:
        if self._stopping.is_set():
            return UpdateCancelledError(f"{what} was cut off: the agent is stopping")
        return EngineError(f"{what} took more than {self._config.engine.start_timeout_s:g} s")

    def _report_from_thread(self, report: UpdateReport) -> None:
        try:
            self._loop.call_soon_threadsafe(self._report, report)
        except RuntimeError:
            logger.debug("a report came after the end of the event loop: %s", report.state)

    def _report(self, report: UpdateReport) -> None:
        """In the event loop."""
        self.last_report = report
        self._tell(report)


def _read_root(repository: RepositoryConfig) -> bytes:
    if repository.root_file is None:
        raise ConfigError(
            "repository.root_file is not set", hint="set it to the root.json that the operator handed out"
        )
    try:
        return repository.root_file.read_bytes()
    except OSError as error:
        raise ConfigError(f"repository.root_file {repository.root_file}: {error.strerror}") from error


def _options(repository: RepositoryConfig) -> UpdateOptions:
    download = DownloadOptions(
        timeout_s=repository.connect_timeout_s,
        low_speed_bytes_per_s=repository.low_speed_bytes_per_s,
        low_speed_time_s=repository.low_speed_time_s,
        speed_limit_bytes_per_s=repository.speed_limit_bytes_per_s,
        retries=repository.retries,
    )
    return UpdateOptions(
        download=download,
        parallel_downloads=repository.parallel_downloads,
        keep_packages=repository.keep_packages,
    )


def _rejection(
    desired: Desired, error: LamplighterError, active: str | None, state: UpdateState = UpdateState.REJECTED
) -> UpdateReport:
    return UpdateReport(
        id=desired.id,
        state=state,
        package=desired.package,
        version=desired.version,
        active=active,
        reason=error.reason,
        message=error.message,
        hint=error.hint,
    )
