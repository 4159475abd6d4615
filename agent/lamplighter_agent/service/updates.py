"""The updater in a thread of its own, joined to the event loop: what is desired goes in, reports come out.

The updater is synchronous and slow (downloads, hashes, fsync). What it asks of the service is in `update_hooks`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import ConfigError, EngineError, LamplighterError, RequestError, StoreError
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.update_hooks import ServiceHooks
from lamplighter_agent.service.update_setup import make_updater
from lamplighter_agent.update import recovery
from lamplighter_agent.update.audit import AuditEntry
from lamplighter_agent.update.clock import judge_clock, now
from lamplighter_agent.update.hooks import UpdateHooks
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.states import Desired, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.updater import Updater

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 4
PREPARE_MODULE: Final = "lamplighter_agent.engine.prepare"
_STOP_TIMEOUT_S: Final = 15.0


class UpdateService:
    """Carries out what the fleet desires, one update at a time; a newer wish ends an older one.

    Args:
        config: The whole configuration.
        store: The packages of this device.
        ledger: What is remembered about updates.
        runner: Tries and switches packages.
        report: Called in the event loop with every report.
        prepare_module: Run as ``python -m MODULE PACKAGE ROOT`` to make the copy for this CPU.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        ledger: Ledger,
        runner: PackageRunner,
        report: Callable[[UpdateReport], None],
        *,
        prepare_module: str = PREPARE_MODULE,
    ) -> None:
        self.last_report: UpdateReport | None = None
        self._config = config
        self._store = store
        self._ledger = ledger
        self._runner = runner
        self._tell = report
        self._prepare_module = prepare_module
        self._updater: Updater | None = None
        self._refusal: ConfigError | None = None
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._wanted: Desired | None = None
        self._at_work: Desired | None = None
        self._interrupt = Interrupt()
        self._jobs: deque[Callable[[Updater], object]] = deque(maxlen=MAX_WAITING)
        self._healing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="updater", daemon=True)

    @property
    def state(self) -> str:
        """State of the last update, ``idle`` before the first."""
        return self.last_report.state.value if self.last_report is not None else "idle"

    async def start_up(self, *, unstable: bool = False) -> InstalledPackage | None:
        """Return the package to run, before any is loaded: after rolling back or healing where that is needed.

        Args:
            unstable: True if the agent did not stay up several times in a row.
        """
        start = await asyncio.to_thread(recovery.start_up, self._store, self._ledger, unstable=unstable)
        if start.report is not None:
            self._report(start.report)
        return start.package

    def start(self) -> None:
        """Go on with an update that a restart cut off, and wait for wishes."""
        service = ServiceHooks(
            self._store,
            self._runner,
            prepare_module=self._prepare_module,
            prepare_timeout_s=self._config.engine.start_timeout_s,
            prompt_weights=self._config.engine.prompt_weights,
        )
        hooks = UpdateHooks(
            prepare=service.prepare, trial=service.trial, activate=service.activate, report=self._report_from_thread
        )
        try:
            self._updater = make_updater(self._config, self._store, hooks, ledger=self._ledger)
        except ConfigError as error:
            logger.info("updates are off: %s", error.message)
            self._refusal = error
            return
        self._note_clock()
        self._thread.start()

    def _note_clock(self) -> None:
        """Say so if the clock cannot be right; the package in use serves all the same."""
        try:
            confirmed = self._ledger.journal.read().clock_confirmed
        except StoreError as error:
            logger.warning("the journal cannot be read: %s", error.message)
            return
        verdict = judge_clock(now(), confirmed)
        if verdict.code != "ok":
            logger.warning("%s", verdict.message)
            self._ledger.audit.write(AuditEntry(event=verdict.code, message=verdict.message))

    def request(self, desired: Desired) -> None:
        """Make the wanted package the one in use, as soon as possible."""
        if self._refusal is not None:
            self._report(_rejection(desired, self._refusal, self._runner.package))
            return
        with self._condition:
            if desired == self._at_work:
                return  # told again by a new connection
            self._wanted = desired
            if self._at_work is not None:
                self._interrupt.cancel()
            self._condition.notify()

    def cancel(self, requested_by: str) -> str:
        """End the update at work, and forget one that waits its turn; return a sentence.

        Raises:
            RequestError: If there is none, or it can no longer be cancelled.
        """
        with self._condition:
            wish, self._wanted = self._wanted, None
            at_work = self._at_work
            cancelled = at_work is not None and self._interrupt.cancel()
        if at_work is not None and not cancelled:
            raise RequestError(f"{at_work} is being activated: it can only be rolled back", code=409)
        if at_work is None and wish is None:
            raise RequestError("no update is at work", code=404)
        entry = AuditEntry(event="cancelled", package=str(at_work or wish), requested_by=requested_by)
        self._ledger.audit.write(entry)
        return f"the update to {at_work or wish} is cancelled"

    async def rollback(self, requested_by: str = "") -> str:
        """Switch back to the previous package and return a sentence.

        Raises:
            LamplighterError: If there is none, it is damaged, or the service could not switch.
        """
        if self._updater is None:
            raise RequestError("updates are not configured on this device", code=404)
        future: concurrent.futures.Future[str] = concurrent.futures.Future()
        if not self._add_job(lambda updater: _roll_back(updater, future, requested_by)):
            raise RequestError("rollbacks are waiting already", code=429, retry_after_s=10.0)
        return await asyncio.wrap_future(future)

    def engine_failed(self, message: str, *, never_ready: bool) -> None:
        """Note that the engine crashed, hung or could not be started; a package on probation may be rolled back.

        Args:
            message: What happened.
            never_ready: True if it could not be started: then the package's files are checked as well.
        """
        verdict = self._ledger.probation.note_failure(message)
        if not self._healing:  # an engine that never starts is tried for ever: its first failure says it all
            entry = AuditEntry(event="engine_failed", active=self._runner.package, message=message)
            self._ledger.audit.write(entry)
        if verdict == "failed":
            self._add_job(Updater.end_failed_probation)
        elif never_ready and not self._healing:
            self._healing = True
            self._add_job(Updater.heal)

    def engine_served(self, seconds: float) -> None:
        """Note that the engine has been ready for some more seconds."""
        self._healing = False
        probation = self._ledger.probation.probation
        if self._ledger.probation.note_serving(seconds) == "passed" and probation is not None:
            logger.info("%s has passed its probation", probation.reference)
            entry = AuditEntry(event="probation_passed", package=str(probation.reference), active=self._runner.package)
            self._ledger.audit.write(entry)

    async def stop(self) -> None:
        """End the update at work at its next step; it goes on after the next start."""
        self._ledger.probation.note_stop()
        self._stopping.set()
        if self._updater is None:
            return
        self._updater.suspend()
        with self._condition:
            self._condition.notify()
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the update at work did not stop in time; it goes on after the next start")

    def _add_job(self, job: Callable[[Updater], object]) -> bool:
        with self._condition:
            if len(self._jobs) == MAX_WAITING:
                return False
            self._jobs.append(job)
            self._condition.notify()
        return True

    # Everything below runs in the updater's thread.

    def _run(self) -> None:
        updater = self._updater
        assert updater is not None
        self._guarded(lambda: self._resume(updater))
        while not self._stopping.is_set():
            with self._condition:
                if self._wanted is None and not self._jobs:
                    self._condition.wait(self._pause_s(updater))
                job = self._jobs.popleft() if self._jobs else None
                desired = None
                if job is None:
                    desired, self._wanted = self._wanted, None
                    self._begin(desired)
            if self._stopping.is_set():
                return
            if job is not None:
                self._guarded(lambda job=job: job(updater))  # type: ignore[misc]
            elif desired is not None:
                self._guarded(lambda desired=desired: self._apply(updater, desired))  # type: ignore[misc]
            else:
                self._guarded(lambda: self._resume(updater))

    def _pause_s(self, updater: Updater) -> float:
        pause_s = self._config.repository.check_interval_s
        try:
            wake_s = updater.next_wake_s()
        except StoreError as error:
            logger.warning("the journal cannot be read: %s", error.message)
            return pause_s
        return pause_s if wake_s is None else min(pause_s, wake_s + 1.0)

    def _begin(self, desired: Desired | None) -> None:
        """With the condition held: from now on a newer wish ends this one, also before the updater has begun it."""
        self._at_work = desired
        self._interrupt = Interrupt()

    def _resume(self, updater: Updater) -> None:
        desired = updater.pending()
        if desired is None:
            return
        with self._condition:
            self._begin(desired)
            if self._wanted == desired:
                self._wanted = None
            elif self._wanted is not None:
                self._interrupt.cancel()
        self._apply(updater, desired)

    def _apply(self, updater: Updater, desired: Desired) -> None:
        try:
            updater.apply(desired, interrupt=self._interrupt)
        except StoreError as error:
            self._report_from_thread(_rejection(desired, error, self._runner.package, UpdateState.FAILED))
        finally:
            with self._condition:
                self._at_work = None

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except LamplighterError as error:
            logger.warning("the update ended: %s", error.message)
        except Exception:  # the thread's boundary: the next update gets its chance
            logger.exception("the updater failed")

    def _report_from_thread(self, report: UpdateReport) -> None:
        try:
            self._loop.call_soon_threadsafe(self._report, report)
        except RuntimeError:
            logger.debug("a report came after the end of the event loop: %s", report.state)

    def _report(self, report: UpdateReport) -> None:
        """In the event loop."""
        self.last_report = report
        self._tell(report)


def _roll_back(updater: Updater, future: concurrent.futures.Future[str], requested_by: str) -> None:
    try:
        outcome = updater.rollback(requested_by=requested_by)
    except LamplighterError as error:
        future.set_exception(error)
    except Exception as error:  # the thread's boundary: who asked must get an answer
        logger.exception("the rollback failed")
        future.set_exception(EngineError(f"the rollback failed: {type(error).__name__}: {error}"))
    else:
        future.set_result(outcome.report.message or "rolled back")


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
