"""One run of an update: its state, journalled before it is acted on, and what is reported about it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec

from lamplighter_agent.errors import LamplighterError, StoreError, UpdateCancelledError
from lamplighter_agent.update.journal import FailedVersion, Journal, JournalState, UpdateRecord
from lamplighter_agent.update.states import Desired, UpdateReport, UpdateState

logger = logging.getLogger(__name__)

RISKY_STATES = frozenset({UpdateState.PREPARING, UpdateState.TRYING, UpdateState.ACTIVATING})
"""States in which the new package's weights are loaded: a package that kills the agent does it here."""

_COMMITTED = frozenset({UpdateState.ACTIVATING})


class Attempt:
    """Keeps the journal and the reports of one run.

    Args:
        desired: What is wanted.
        journal: Where each state is written before it is acted on, or None for a run that is not resumed.
        state: What the journal held.
        report: Is told every change of state, and progress.
        active: Returns ``name/version`` of the package in use, or None.
        stop: Set from any thread to cancel.
        interruptions: How often this update was cut off in a risky state.
    """

    def __init__(
        self,
        desired: Desired,
        *,
        journal: Journal | None,
        state: JournalState,
        report: Callable[[UpdateReport], None],
        active: Callable[[], str | None],
        stop: threading.Event,
        interruptions: int = 0,
    ) -> None:
        self.desired = desired
        self.interruptions = interruptions
        self.stop = stop
        self.file: str | None = None
        self.step = UpdateState.RECEIVED
        self.manifest_sha256 = ""
        self.switched_back = False
        self._journal = journal
        self._state = state
        self._report = report
        self._active = active
        self._begin_s = time.monotonic()
        self._bytes_done = self._bytes_total = 0

    def enter(self, step: UpdateState) -> None:
        """Go on to a state: journal it, report it.

        Raises:
            UpdateCancelledError: If the update was cancelled and can still be.
            StoreError: If the journal cannot be written.
        """
        if self.stop.is_set() and step not in _COMMITTED:
            raise UpdateCancelledError(f"{self.desired}: cancelled before {step.value}")
        self.step, self.file = step, None
        report = self._make_report(step)
        self._write(report, again=False)
        self._report(report)
        logger.info("%s: %s", self.desired, step.value)

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """Report how much of the package is here; not journalled."""
        self._bytes_done, self._bytes_total = bytes_done, bytes_total
        self._report(self._make_report(self.step))

    def failure_before(self) -> FailedVersion | None:
        """Return why the wanted package, with the manifest of ``manifest_sha256``, failed here before, or None."""
        return self._state.failure_of(self.desired.reference, self.manifest_sha256)

    def remember_failure(self, message: str) -> None:
        """Note that the wanted package failed here; `finish` writes it."""
        failed = FailedVersion(reference=self.desired.reference, manifest_sha256=self.manifest_sha256, message=message)
        self._state = self._state.with_failure(failed)

    def forget_failure(self) -> None:
        """Note that the wanted package works after all; `finish` writes it."""
        self._state = self._state.without_failure(self.desired.reference)

    def finish(
        self,
        end: UpdateState,
        *,
        error: LamplighterError | None = None,
        message: str | None = None,
        again: bool = False,
    ) -> UpdateReport:
        """End the update: journal and report the final state.

        Args:
            end: The final state.
            error: Why it did not succeed, or None.
            message: A sentence when there is no error, or None.
            again: True if the same request may be tried again.
        """
        report = self._make_report(end)
        if error is None:
            report = msgspec.structs.replace(report, message=message)
        else:
            report = msgspec.structs.replace(report, reason=error.reason, message=error.message, hint=error.hint)
        try:
            self._write(report, again=again)
        except StoreError as failure:
            # The end is told even if the disk does not take it: the fleet must not wait for ever.
            logger.warning("the end of the update is not kept: %s", failure)
        self._report(report)
        level = logging.INFO if error is None else logging.WARNING
        logger.log(level, "%s: %s. %s", self.desired, end.value, report.message or "")
        return report

    def suspend(self) -> UpdateReport:
        """Put the update back to its beginning, not ended: the next process goes on with it.

        An orderly end of the agent is no sign against the package, so that the state is none of `RISKY_STATES`.
        """
        report = self._make_report(UpdateState.RECEIVED)
        try:
            self._write(report, again=False)
        except StoreError as failure:
            logger.warning("the update is not put back: %s", failure)
        logger.info("%s: suspended in %s", self.desired, self.step.value)
        return report

    def _make_report(self, step: UpdateState) -> UpdateReport:
        return UpdateReport(
            id=self.desired.id,
            state=step,
            package=self.desired.package,
            version=self.desired.version,
            active=self._active(),
            bytes_done=self._bytes_done,
            bytes_total=self._bytes_total,
            file=self.file,
            duration_s=time.monotonic() - self._begin_s,
        )

    def _write(self, report: UpdateReport, *, again: bool) -> None:
        record = UpdateRecord(desired=self.desired, report=report, interruptions=self.interruptions, again=again)
        self._state = msgspec.structs.replace(self._state, record=record)
        if self._journal is not None:
            self._journal.write(self._state)
