"""The way of a package onto this device: check, download, verify, prepare, try, activate.

Each state is written to the journal before it is acted on, and everything a state does can be done again, so that
after a crash or a power cut the same update goes on. A failure anywhere leaves the package in use untouched.

The updater is synchronous and runs in one thread of the agent. What it must not know (the engine, the service) it is
given as `UpdateHooks`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

import msgspec

from lamplighter_agent.errors import PackageError
from lamplighter_agent.update import clock, recovery
from lamplighter_agent.update.acquire import Acquirer
from lamplighter_agent.update.attempt import Attempt, Surroundings
from lamplighter_agent.update.audit import AuditEntry
from lamplighter_agent.update.compatibility import DeviceFacts
from lamplighter_agent.update.course import Course, Plan, switch
from lamplighter_agent.update.downgrade import version_key
from lamplighter_agent.update.downloader import Downloader
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.journal import JournalState, UpdateRecord
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.sources import Source
from lamplighter_agent.update.states import Desired, PackageRef, UpdateOutcome, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trust import TrustedRepository

logger = logging.getLogger(__name__)


class Updater:
    """Brings packages onto this device and switches between them.

    Args:
        store: The packages on this device.
        source: The repository.
        root: The provisioned root metadata.
        device: What this device offers.
        hooks: The rest of the agent.
        options: How updates are carried out.
        ledger: What is remembered; None opens that of the store.
        now: This device's clock, aware.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        *,
        root: bytes,
        device: DeviceFacts,
        hooks: UpdateHooks,
        options: UpdateOptions | None = None,
        ledger: Ledger | None = None,
        now: Callable[[], datetime] = clock.now,
    ) -> None:
        self._store = store
        self._source = source
        self._root = root
        self._device = device
        self._hooks = hooks
        self._options = options or UpdateOptions()
        self._ledger = ledger or Ledger.open(store.root)
        self._plan = Plan(self._options, now)
        self._guard = threading.Lock()
        self._at_work: Interrupt | None = None
        self._suspended = False

    def suspend(self) -> None:
        """End the update at work without a final state: after a restart it goes on.

        For the agent's own end; callable from any thread. This updater begins nothing any more.
        """
        with self._guard:
            self._suspended = True
            if self._at_work is not None:
                self._at_work.suspend()

    def apply(self, desired: Desired, *, interrupt: Interrupt | None = None) -> UpdateOutcome:
        """Make the wanted package the one in use. Every failure is reported, none is raised but the one below.

        A request that has ended already only has its result told again, unless it ended for a passing reason. One
        that was followed by another is old news: the result of the latest is told again.

        Args:
            desired: What is wanted.
            interrupt: Set from any thread, it ends the update; also when it was set before this call. From the
                moment on which a package is being activated an update is no longer cancelled.

        Raises:
            StoreError: If another update is at work on the store, or the store cannot be opened.
        """
        with self._store.lock(), self._working(interrupt) as interrupt:
            state = self._ledger.journal.read()
            record = state.record
            if record is not None and record.desired == desired:
                if self._is_settled(record):
                    return self._tell_again(record)
            elif record is not None and state.is_earlier(desired):
                self._note_request("replayed", desired)
                return self._tell_again(record)
            else:
                self._note_request("requested", desired)
                state, record = state.without_record(), None
            before = self._current_reference()
            state = self._raise_highest(state, before)
            attempt = Attempt(desired, self._surroundings(), state, interrupt, record=record)
            course = Course(self._store, self._ledger.probation, self._hooks, self._plan, self._obtain)
            report = course.run(attempt, before)
            return UpdateOutcome(report=report, changed=self._current_reference() != before)

    def pending(self) -> Desired | None:
        """Return the request to go on with: one that a restart cut off, that may go on now, or that may be tried again.

        The agent asks when it starts, every ``repository.check_interval_s``, and after `next_wake_s`.

        Raises:
            StoreError: If the journal cannot be read.
        """
        record = self._ledger.journal.read().record
        return None if record is None or self._is_settled(record) else record.desired

    def resume(self, *, interrupt: Interrupt | None = None) -> UpdateOutcome | None:
        """Apply the `pending` request; return how it ended, or None if there is none.

        Raises:
            StoreError: If another update is at work on the store, or the store cannot be opened.
        """
        desired = self.pending()
        return None if desired is None else self.apply(desired, interrupt=interrupt)

    def next_wake_s(self) -> float | None:
        """Return how long it is until an update that waits for its window may go on; None if none waits.

        Raises:
            StoreError: If the journal cannot be read.
        """
        record = self._ledger.journal.read().record
        if record is None or record.report.state is not UpdateState.WAITING:
            return None
        return self._plan.waits_for_s(record)

    def pull(self, reference: PackageRef, *, interrupt: Interrupt | None = None) -> InstalledPackage:
        """Bring a package onto this device, verified, without trying or activating it.

        Raises:
            PackageError: If it is not signed, not whole, or not for this device.
            DownloadError: If it cannot be fetched.
            StoreError: If the disk is full or refuses, or another update is at work on the store.
            UpdateCancelledError: If it was cancelled.
        """
        desired = Desired(package=reference.name, version=reference.version, id="pull", requested_by="pull")
        with self._store.lock(), self._working(interrupt) as interrupt:
            self._note_request("requested", desired)
            around = replace(self._surroundings(), journal=None)
            state = self._ledger.journal.read()
            attempt = Attempt(desired, around, JournalState(highest=state.highest), interrupt)
            try:
                return self._obtain(attempt)
            finally:
                interrupt.limit(None, "")

    def packages(self) -> tuple[PackageRef, ...]:
        """Return every package that the repository signs.

        Raises:
            PackageError: If its metadata is not to be trusted.
            DownloadError: If it cannot be reached.
            StoreError: If another update is at work on the store, or the store cannot be written.
        """
        with self._store.lock():
            downloader = Downloader(self._source, self._options.download)
            return self._repository(downloader, self._ledger.journal.read()).packages()

    def rollback(self, *, requested_by: str = "") -> UpdateOutcome:
        """Switch back to the previous package.

        Args:
            requested_by: Who asked, for the audit log.

        Raises:
            UnknownPackageError: If there is none.
            PackageError: If it is damaged.
            StoreError: If another update is at work on the store, or the file system refuses.
            UpdateDeadlineError: If the service does not switch in time; it is then on the package it had.
            LamplighterError: If the service could not switch; it is then on the package it had.
        """
        with self._store.lock(), self._working(None) as interrupt:
            state = self._ledger.journal.read()
            left = self._current_reference()
            package = self._store.roll_back()
            wanted = left or package.reference
            desired = Desired(package=wanted.name, version=wanted.version, id="rollback", requested_by=requested_by)
            self._note_request("rollback_requested", desired)
            interrupt.limit(self._options.deadlines.activating_s, f"rolling back to {package.reference}")
            try:
                switch(self._hooks, package.reference, interrupt, self._options.hook_grace_s)
            except Exception:
                # Whatever kept the service from switching, the link must not name what it does not run.
                if left is not None:
                    self._store.activate(left)
                raise
            self._ledger.probation.end()
            if state.record is not None and str(state.record.desired) == str(wanted):
                # The request that brought the package here has ended like this: told again, it must not say 'active'.
                desired = state.record.desired
            else:
                state = state.without_record()
            attempt = Attempt(desired, self._surroundings(), state, interrupt)
            report = attempt.finish(UpdateState.ROLLED_BACK, message=f"rolled back to {package.reference} by hand")
            return UpdateOutcome(report=report, changed=True)

    def end_failed_probation(self) -> UpdateOutcome | None:
        """Switch from a package that failed its probation to the one before it; called when the book says so.

        Returns:
            How that ended, or None if no package is on probation any more or there is nothing to switch to.

        Raises:
            LamplighterError: If the service could not switch; the next start uses the package before all the same.
        """
        with self._store.lock(), self._working(None) as interrupt:
            before = self._store.in_use()
            return self._follow(recovery.end_failed_probation(self._store, self._ledger), before, interrupt)

    def heal(self) -> UpdateOutcome | None:
        """Check the package in use thoroughly; if it is damaged, switch to another one until `resume` has repaired it.

        Returns:
            How that ended, or None if nothing was wrong.

        Raises:
            StoreError: If another update is at work on the store, or the file system refuses.
            LamplighterError: If the service could not switch; the next start uses the other package all the same.
        """
        with self._store.lock(), self._working(None) as interrupt:
            before = self._store.in_use()
            return self._follow(recovery.heal(self._store, self._ledger, thorough=True), before, interrupt)

    def _follow(
        self, turn: recovery.Turn | None, before: PackageRef | None, interrupt: Interrupt
    ) -> UpdateOutcome | None:
        if turn is None:
            return None
        self._hooks.report(turn.report)
        changed = turn.package is not None and turn.package != before
        if turn.package is not None and changed:
            interrupt.limit(self._options.deadlines.activating_s, f"switching to {turn.package}")
            switch(self._hooks, turn.package, interrupt, self._options.hook_grace_s)
        return UpdateOutcome(report=turn.report, changed=changed)

    @contextmanager
    def _working(self, interrupt: Interrupt | None) -> Iterator[Interrupt]:
        """Let `suspend` reach what is at work; an updater that is suspended already begins nothing."""
        interrupt = interrupt or Interrupt()
        with self._guard:
            self._at_work = interrupt
            if self._suspended:
                interrupt.suspend()
        try:
            yield interrupt
        finally:
            interrupt.limit(None, "")
            with self._guard:
                self._at_work = None

    def _is_settled(self, record: UpdateRecord) -> bool:
        """Return whether there is nothing to do for a request now."""
        if record.report.state is UpdateState.WAITING:
            return self._plan.waits_for_s(record) > 0
        return record.report.state.is_final and not record.again

    def _raise_highest(self, state: JournalState, current: PackageRef | None) -> JournalState:
        """Count the package in use as the highest of its name, once it has passed its probation."""
        probation = self._ledger.probation.probation
        if current is None or (probation is not None and probation.reference == current):
            return state
        highest = state.highest.get(current.name)
        if highest is not None and version_key(current.version) <= version_key(highest):
            return state
        return state.with_highest(current)

    def _note_request(self, event: str, desired: Desired) -> None:
        entry = AuditEntry(
            event=event,
            package=str(desired),
            requested_by=desired.requested_by,
            request=desired.id,
            active=self._active_text(),
        )
        self._ledger.audit.write(entry)

    def _tell_again(self, record: UpdateRecord) -> UpdateOutcome:
        active = self._active_text()
        report = msgspec.structs.replace(record.report, active=active)
        if report.state is UpdateState.ACTIVE and active != str(record.desired):
            # A rollback by hand that a power cut ended before it was written down.
            report = msgspec.structs.replace(report, state=UpdateState.ROLLED_BACK, message=f"{active} is in use")
        self._hooks.report(report)
        return UpdateOutcome(report=report, changed=False)

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            journal=self._ledger.journal,
            audit=self._ledger.audit,
            report=self._hooks.report,
            active=self._active_text,
            deadlines=self._options.deadlines,
        )

    def _obtain(self, attempt: Attempt) -> InstalledPackage:
        downloader = Downloader(self._source, self._options.download, attempt.interrupt)
        state = self._ledger.journal.read()
        moment = self._plan.now()
        verdict = clock.judge_clock(moment, state.clock_confirmed)
        if verdict.code != "ok":
            attempt.warning = verdict.code
            attempt.note(verdict.code, verdict.message)
            logger.warning("%s", verdict.message)
        acquirer = Acquirer(
            store=self._store,
            downloader=downloader,
            repository=self._repository(downloader, state),
            device=self._device,
            clock=verdict,
            moment=moment,
            parallel_downloads=self._options.parallel_downloads,
            progress_interval_s=self._options.progress_interval_s,
        )
        return acquirer.obtain(attempt)

    def _repository(self, downloader: Downloader, state: JournalState) -> TrustedRepository:
        return TrustedRepository(
            downloader,
            root=self._root,
            metadata_dir=self._store.metadata_dir,
            scratch_dir=self._store.staging_dir / "metadata",
            not_before=clock.judge_clock(self._plan.now(), state.clock_confirmed).passed,
        )

    def _current_reference(self) -> PackageRef | None:
        try:
            current = self._store.current()
        except PackageError as error:
            # A package in use that cannot be read any more must not keep a better one from taking its place.
            logger.warning("the package in use cannot be read: %s", error)
            return None
        return None if current is None else current.reference

    def _active_text(self) -> str | None:
        reference = self._current_reference()
        return None if reference is None else str(reference)
