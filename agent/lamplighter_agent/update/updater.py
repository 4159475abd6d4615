"""The way of a package onto this device: check, download, verify, prepare, try, activate.

Each state is written to the journal before it is acted on, and everything a state does can be done again, so that
after a crash or a power cut the same update goes on. A failure anywhere leaves the package in use untouched.

The updater is synchronous and runs in one thread of the agent. What it must not know (the engine, the service) it is
given as `UpdateHooks`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lamplighter_agent.errors import (
    LamplighterError,
    PackageError,
    StoreError,
    TrialFailedError,
    UpdateCancelledError,
)
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update.acquire import Acquirer
from lamplighter_agent.update.attempt import RISKY_STATES, Attempt
from lamplighter_agent.update.compatibility import DeviceFacts
from lamplighter_agent.update.downloader import Downloader, DownloadOptions
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.journal import Journal, JournalState, UpdateRecord
from lamplighter_agent.update.sources import Source
from lamplighter_agent.update.states import Desired, PackageRef, UpdateOutcome, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement, judge_trial
from lamplighter_agent.update.trust import TrustedRepository

logger = logging.getLogger(__name__)

JOURNAL_NAME = "update.json"
_MAX_INTERRUPTIONS = 3


@dataclass(frozen=True, slots=True)
class UpdateHooks:
    """What the rest of the agent does for an update.

    Attributes:
        prepare: Makes derived files for this CPU from a staged package.
        trial: Starts a candidate worker on a staged package, runs the manifest's self-tests and measures.
        activate: Switches the service over to a package that `Store.current` already names. When it raises, the
            service is still, or again, on the package that it had before.
        report: Is told every change of state and, about once a second, progress.
    """

    prepare: Callable[[Path, Manifest], None]
    trial: Callable[[Path, Manifest], TrialMeasurement]
    activate: Callable[[PackageRef], None]
    report: Callable[[UpdateReport], None]


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How updates are carried out.

    Attributes:
        download: How patient and how greedy a download is.
        parallel_downloads: Files fetched at once.
        keep_packages: Installed packages kept besides the one in use; the previous one is always among them.
        progress_interval_s: Time between two progress reports.
    """

    download: DownloadOptions = field(default_factory=DownloadOptions)
    parallel_downloads: int = 2
    keep_packages: int = 1
    progress_interval_s: float = 1.0


class Updater:
    """Brings packages onto this device and switches between them.

    Args:
        store: The packages on this device.
        source: The repository.
        root: The provisioned root metadata.
        device: What this device offers.
        hooks: The rest of the agent.
        options: How updates are carried out.
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
    ) -> None:
        self._store = store
        self._source = source
        self._root = root
        self._device = device
        self._hooks = hooks
        self._options = options or UpdateOptions()
        self._journal = Journal(store.root / JOURNAL_NAME)
        self._stop = threading.Event()
        self._suspended = False

    def cancel(self) -> None:
        """End the update at work at its next block or step; callable from any thread.

        From the moment on which a package is being activated it is no longer cancelled.
        """
        self._stop.set()

    def suspend(self) -> None:
        """End the update at work like `cancel`, but without a final state: after a restart it goes on.

        For the agent's own end; callable from any thread. This updater begins nothing any more.
        """
        self._suspended = True
        self._stop.set()

    def apply(self, desired: Desired) -> UpdateOutcome:
        """Make the wanted package the one in use. Every failure is reported, none is raised but the one below.

        A request that has ended already only has its result told again, unless it ended for a passing reason.

        Raises:
            StoreError: If another update is at work on the store, or the store cannot be opened.
        """
        with self._store.lock():
            state = self._journal.read()
            record = state.record
            interruptions = 0
            if record is not None and record.desired == desired:
                if record.report.state.is_final and not record.again:
                    return self._tell_again(record)
                interruptions = record.interruptions + (record.report.state in RISKY_STATES)
            attempt = self._begin(desired, state, interruptions=interruptions, journal=self._journal)
            before = self._current_reference()
            report = self._run(attempt, before)
            return UpdateOutcome(report=report, changed=self._current_reference() != before)

    def resume(self) -> UpdateOutcome | None:
        """Go on with an update that a restart cut off, or try one again that ended for a passing reason.

        The agent calls it when it starts and every ``repository.check_interval_s``.

        Returns:
            How it ended, or None if there is nothing to go on with.

        Raises:
            StoreError: If another update is at work on the store, or the store cannot be opened.
        """
        record = self._journal.read().record
        if record is None or (record.report.state.is_final and not record.again):
            return None
        return self.apply(record.desired)

    def pull(self, reference: PackageRef) -> InstalledPackage:
        """Bring a package onto this device, verified, without trying or activating it.

        Raises:
            PackageError: If it is not signed, not whole, or not for this device.
            DownloadError: If it cannot be fetched.
            StoreError: If the disk is full or refuses, or another update is at work on the store.
            UpdateCancelledError: If it was cancelled.
        """
        desired = Desired(package=reference.name, version=reference.version, id="pull", requested_by="pull")
        with self._store.lock():
            attempt = self._begin(desired, JournalState(), journal=None)
            return self._acquirer(attempt).obtain(attempt)

    def packages(self) -> tuple[PackageRef, ...]:
        """Return every package that the repository signs.

        Raises:
            PackageError: If its metadata is not to be trusted.
            DownloadError: If it cannot be reached.
            StoreError: If another update is at work on the store, or the store cannot be written.
        """
        with self._store.lock():
            return self._repository(Downloader(self._source, self._options.download)).packages()

    def rollback(self) -> UpdateOutcome:
        """Switch back to the previous package.

        Raises:
            UnknownPackageError: If there is none.
            PackageError: If it is damaged.
            StoreError: If another update is at work on the store, or the file system refuses.
            LamplighterError: If the service could not switch; it is then on the package it had.
        """
        with self._store.lock():
            state = self._journal.read()
            left = self._current_reference()
            package = self._store.roll_back()
            try:
                self._hooks.activate(package.reference)
            except Exception:
                # Whatever kept the service from switching, the link must not name what it does not run.
                if left is not None:
                    self._store.activate(left)
                raise
            wanted = left or package.reference
            desired = Desired(package=wanted.name, version=wanted.version, id="rollback")
            if state.record is not None and str(state.record.desired) == str(wanted):
                # The request that brought the package here has ended like this: told again, it must not say 'active'.
                desired = state.record.desired
            attempt = self._begin(desired, state, journal=self._journal)
            report = attempt.finish(UpdateState.ROLLED_BACK, message=f"rolled back to {package.reference} by hand")
            return UpdateOutcome(report=report, changed=True)

    def _begin(
        self, desired: Desired, state: JournalState, *, journal: Journal | None, interruptions: int = 0
    ) -> Attempt:
        if not self._suspended:
            self._stop.clear()
        return Attempt(
            desired,
            journal=journal,
            state=state,
            report=self._hooks.report,
            active=self._active_text,
            stop=self._stop,
            interruptions=interruptions,
        )

    def _run(self, attempt: Attempt, before: PackageRef | None) -> UpdateReport:
        """Carry an update out and end it, whatever happens."""
        known = set(self._store.installed())
        try:
            self._bring_into_use(attempt, before)
        except LamplighterError as error:
            return self._fail(attempt, error, known)
        except Exception as error:
            # The boundary of an update: a defect in it or in a hook must not leave the fleet waiting for its end.
            logger.exception("the update to %s ended by a defect", attempt.desired)
            return self._fail(attempt, LamplighterError(f"{type(error).__name__}: {error}"), known)
        attempt.forget_failure()
        report = attempt.finish(UpdateState.ACTIVE)
        self._tidy()
        return report

    def _bring_into_use(self, attempt: Attempt, before: PackageRef | None) -> None:
        attempt.enter(UpdateState.RECEIVED)
        if before == attempt.desired.reference and self._is_whole(before):
            return
        package = self._acquirer(attempt).obtain(attempt)
        attempt.enter(UpdateState.PREPARING)
        if attempt.interruptions >= _MAX_INTERRUPTIONS:
            raise TrialFailedError(
                f"{package.reference}: the agent was cut off {attempt.interruptions} times while trying it",
                hint="it may need more memory than this device has",
            )
        self._hooks.prepare(package.path, package.manifest)
        attempt.enter(UpdateState.TRYING)
        measurement = self._hooks.trial(package.path, package.manifest)
        verdict = judge_trial(package.manifest, measurement, attempt.desired.policy.limits)
        if not verdict.passed:
            raise TrialFailedError(f"{package.reference}: {verdict.code}: {verdict.message}")
        attempt.enter(UpdateState.ACTIVATING)
        self._store.activate(package.reference)
        try:
            self._hooks.activate(package.reference)
        except Exception:
            # Whatever kept the service from switching, defects included, the link must not name what it does not run.
            if before != package.reference:
                self._store.return_to(before)
            attempt.switched_back = True
            raise

    def _fail(self, attempt: Attempt, error: LamplighterError, known: set[PackageRef]) -> UpdateReport:
        """End an update that did not succeed, and remove a package that it brought and that is not wanted again."""
        cancelled = isinstance(error, UpdateCancelledError)
        if cancelled and self._suspended:
            return attempt.suspend()
        tried = attempt.step in RISKY_STATES and not cancelled and not isinstance(error, StoreError)
        if tried:
            attempt.remember_failure(error.message)
        report = attempt.finish(_end_of(attempt, error), error=error, again=not tried and not cancelled)
        if tried or attempt.step is UpdateState.VERIFYING:
            self._discard_new(attempt.desired.reference, known)
        if tried:
            self._tidy()
        return report

    def _discard_new(self, reference: PackageRef, known: set[PackageRef]) -> None:
        if reference in known:
            return
        try:
            self._store.discard(reference)
        except StoreError as error:
            logger.warning("the refused package stays on the disk until the next update: %s", error)

    def _tidy(self) -> None:
        """Remove what is beyond ``keep_packages``; the update has ended already, whatever comes of this."""
        try:
            self._store.prune(self._store.newest(self._options.keep_packages))
        except LamplighterError as error:
            logger.warning("the store could not be pruned: %s", error)

    def _is_whole(self, reference: PackageRef) -> bool:
        try:
            self._store.verify(self._store.package(reference))
        except PackageError as error:
            logger.warning("the package in use is damaged and will be fetched again: %s", error)
            return False
        return True

    def _tell_again(self, record: UpdateRecord) -> UpdateOutcome:
        report = msgspec.structs.replace(record.report, active=self._active_text())
        self._hooks.report(report)
        return UpdateOutcome(report=report, changed=False)

    def _acquirer(self, attempt: Attempt) -> Acquirer:
        downloader = Downloader(self._source, self._options.download, attempt.stop)
        return Acquirer(
            store=self._store,
            downloader=downloader,
            repository=self._repository(downloader),
            device=self._device,
            parallel_downloads=self._options.parallel_downloads,
            progress_interval_s=self._options.progress_interval_s,
        )

    def _repository(self, downloader: Downloader) -> TrustedRepository:
        scratch_dir = self._store.staging_dir / "metadata"
        return TrustedRepository(
            downloader, root=self._root, metadata_dir=self._store.metadata_dir, scratch_dir=scratch_dir
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


def _end_of(attempt: Attempt, error: LamplighterError) -> UpdateState:
    if isinstance(error, UpdateCancelledError):
        return UpdateState.CANCELLED
    if attempt.switched_back:
        return UpdateState.ROLLED_BACK
    if attempt.step in {UpdateState.RECEIVED, UpdateState.CHECKING} and isinstance(error, PackageError):
        return UpdateState.REJECTED
    return UpdateState.FAILED
