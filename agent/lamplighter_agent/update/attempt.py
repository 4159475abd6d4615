"""One run of an update: its state, journalled before it is acted on, and what is reported about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import msgspec

from lamplighter_agent.errors import LamplighterError, StoreError, TrialFailedError
from lamplighter_agent.update.audit import AuditEntry, AuditLog
from lamplighter_agent.update.deadlines import StateDeadlines
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.journal import FailedVersion, Journal, JournalState, UpdateRecord
from lamplighter_agent.update.states import Desired, PackageRef, UpdateReport, UpdateState

logger = logging.getLogger(__name__)

RISKY_STATES = frozenset({UpdateState.PREPARING, UpdateState.TRYING, UpdateState.ACTIVATING})
"""States in which the new package's weights are loaded: a package that kills the agent does it here."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every run of an update needs.

    Attributes:
        journal: Where each state is written before it is acted on, or None for a run that is not resumed.
        audit: Where each state is noted for people.
        report: Is told every change of state, and progress.
        active: Returns ``name/version`` of the package in use, or None.
        deadlines: Longest time of each state.
    """

    journal: Journal | None
    audit: AuditLog
    report: Callable[[UpdateReport], None]
    active: Callable[[], str | None]
    deadlines: StateDeadlines


class Attempt:
    """Keeps the journal and the reports of one run.

    Args:
        desired: What is wanted.
        around: Where states are kept and told.
        state: What the journal held.
        interrupt: Ends the run from outside.
        record: The same request's earlier run, or None.
    """

    def __init__(
        self,
        desired: Desired,
        around: Surroundings,
        state: JournalState,
        interrupt: Interrupt,
        *,
        record: UpdateRecord | None = None,
    ) -> None:
        self.desired = desired
        self.interrupt = interrupt
        self.interruptions = self.cut_offs = 0
        self.staged_sha256 = ""
        self.waiting_since: datetime | None = None
        if record is not None:
            self.interruptions = record.interruptions + (record.running and record.report.state in RISKY_STATES)
            self.cut_offs = record.cut_offs + record.running
            self.staged_sha256 = record.staged_sha256
            self.waiting_since = record.waiting_since
        self.file: str | None = None
        self.step = UpdateState.RECEIVED
        self.manifest_sha256 = ""
        self.switched_back = False
        self.warning: str | None = None
        self._around = around
        self._state = state
        self._begin_s = self._step_begin_s = time.monotonic()
        self._state_s: dict[str, float] = {}
        self._bytes_done = self._bytes_total = 0

    def enter(self, step: UpdateState) -> None:
        """Go on to a state: set its deadline, journal it, report it.

        Raises:
            UpdateCancelledError: If the update was cancelled and can still be.
            UpdateDeadlineError: If the time of the state before is over.
            StoreError: If the journal cannot be written.
        """
        if step is UpdateState.ACTIVATING:
            self.interrupt.commit()
        else:
            self.interrupt.check(f"{self.desired} before {step.value}")
        self._leave_step()
        self.step, self.file = step, None
        self.interrupt.limit(self._around.deadlines.of(step), f"{step.value} {self.desired}")
        report = self._make_report(step)
        self._write(report, running=True)
        self._note(report)
        self._around.report(report)
        logger.info("%s: %s", self.desired, step.value)

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        """Report how much of the package is here; not journalled."""
        self._bytes_done, self._bytes_total = bytes_done, bytes_total
        self._around.report(self._make_report(self.step))

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

    @property
    def highest(self) -> str | None:
        """Highest version of the wanted name that has served well here, or None."""
        return self._state.highest.get(self.desired.package)

    def permit_downgrade(self, reference: PackageRef) -> None:
        """Note that a lower version takes the place of the highest, as its signers permit."""
        self._state = self._state.with_highest(reference)
        message = f"{reference} may replace {self.highest}: its signers permit it"
        self.note("downgrade_permitted", message)

    def confirm_clock(self, moment: datetime) -> None:
        """Note that the clock agrees with freshly signed metadata."""
        self._state = msgspec.structs.replace(self._state, clock_confirmed=moment)

    def note(self, event: str, message: str, reason: str | None = None) -> None:
        """Write an entry about this request into the audit log."""
        self._around.audit.write(
            AuditEntry(
                event=event,
                package=str(self.desired),
                requested_by=self.desired.requested_by,
                request=self.desired.id,
                active=self._around.active(),
                reason=reason,
                message=message,
            )
        )

    def finish(
        self,
        end: UpdateState,
        *,
        error: LamplighterError | None = None,
        message: str | None = None,
        again: bool = False,
    ) -> UpdateReport:
        """End the run: journal and report its last state, a final one or ``waiting``.

        Args:
            end: That state.
            error: Why it did not succeed, or None.
            message: A sentence when there is no error, or None.
            again: True if the same request may be tried again.
        """
        self.interrupt.limit(None, "")
        self._leave_step()
        report = self._make_report(end)
        if error is None:
            report = msgspec.structs.replace(report, message=message)
        else:
            detail = error.detail if isinstance(error, TrialFailedError) else None
            report = msgspec.structs.replace(
                report, reason=error.reason, detail=detail, message=error.message, hint=error.hint
            )
        try:
            self._write(report, again=again)
        except StoreError as failure:
            # The end is told even if the disk does not take it: the fleet must not wait for ever.
            logger.warning("the end of the update is not kept: %s", failure)
        self._note(report)
        self._around.report(report)
        level = logging.INFO if error is None else logging.WARNING
        logger.log(level, "%s: %s. %s", self.desired, end.value, report.message or "")
        return report

    def suspend(self) -> UpdateReport:
        """Put the update back to its beginning, not ended: the next process goes on with it.

        An orderly end of the agent is no sign against the package, so that the run does not count as cut off.
        """
        self.interrupt.limit(None, "")
        report = self._make_report(UpdateState.RECEIVED)
        try:
            self._write(report)
        except StoreError as failure:
            logger.warning("the update is not put back: %s", failure)
        logger.info("%s: suspended in %s", self.desired, self.step.value)
        return report

    def _leave_step(self) -> None:
        now_s = time.monotonic()
        spent_s = self._state_s.get(self.step.value, 0.0) + now_s - self._step_begin_s
        self._state_s = {**self._state_s, self.step.value: round(spent_s, 3)}
        self._step_begin_s = now_s

    def _make_report(self, step: UpdateState) -> UpdateReport:
        return UpdateReport(
            id=self.desired.id,
            state=step,
            package=self.desired.package,
            version=self.desired.version,
            active=self._around.active(),
            bytes_done=self._bytes_done,
            bytes_total=self._bytes_total,
            file=self.file,
            warning=self.warning,
            duration_s=round(time.monotonic() - self._begin_s, 3),
            state_s=self._state_s,
        )

    def _note(self, report: UpdateReport) -> None:
        self.note(report.state.value, report.message or "", report.reason)

    def _write(self, report: UpdateReport, *, running: bool = False, again: bool = False) -> None:
        record = UpdateRecord(
            desired=self.desired,
            report=report,
            interruptions=self.interruptions,
            cut_offs=self.cut_offs,
            running=running,
            again=again,
            staged_sha256=self.staged_sha256,
            waiting_since=self.waiting_since,
        )
        self._state = msgspec.structs.replace(self._state, record=record)
        if self._around.journal is not None:
            self._around.journal.write(self._state)
