"""One update carried out: from the request to its end, in the order of its states."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from lamplighter_agent.errors import (
    LamplighterError,
    MemoryShortError,
    PackageError,
    StoreError,
    TrialFailedError,
    UpdateCancelledError,
    UpdateCutOffError,
    WindowMissedError,
)
from lamplighter_agent.update.attempt import RISKY_STATES, Attempt
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.journal import UpdateRecord
from lamplighter_agent.update.probation import Probation, ProbationBook
from lamplighter_agent.update.states import Desired, PackageRef, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import judge_trial
from lamplighter_agent.update.window import Window

logger = logging.getLogger(__name__)

_MAX_INTERRUPTIONS = 3
_MAX_CUT_OFFS = 30


@dataclass(frozen=True, slots=True)
class Plan:
    """How and when updates are carried out.

    Attributes:
        options: How.
        now: This device's clock, aware.
    """

    options: UpdateOptions
    now: Callable[[], datetime]

    def window_of(self, desired: Desired) -> str | None:
        """Return the window that a request must wait for, or None."""
        return None if desired.policy.urgent else desired.policy.window or self.options.window

    def closed_for_s(self, desired: Desired) -> float:
        """Return how long a request must wait for its window."""
        text = self.window_of(desired)
        return 0.0 if text is None else Window.parse(text).seconds_until_open(self.now().astimezone())

    def waits_for_s(self, record: UpdateRecord) -> float:
        """Return how long an update that waits has nothing to do: until its window opens or its patience ends."""
        closed_s = self.closed_for_s(record.desired)
        if record.waiting_since is None:
            return closed_s
        waited_s = (self.now() - record.waiting_since).total_seconds()
        return max(0.0, min(closed_s, self.options.deadlines.waiting_s - waited_s))


class Course:
    """Carries updates out; the caller holds the store's lock.

    Args:
        store: The packages on this device.
        probation: Where a package that is new in use is kept an eye on.
        hooks: The rest of the agent.
        plan: How and when.
        obtain: Brings the wanted package into the store, verified.
    """

    def __init__(
        self,
        store: Store,
        probation: ProbationBook,
        hooks: UpdateHooks,
        plan: Plan,
        obtain: Callable[[Attempt], InstalledPackage],
    ) -> None:
        self._store = store
        self._probation = probation
        self._hooks = hooks
        self._plan = plan
        self._options = plan.options
        self._obtain = obtain

    def run(self, attempt: Attempt, before: PackageRef | None) -> UpdateReport:
        """Carry an update out and end it, whatever happens.

        Args:
            attempt: The run.
            before: The package in use.
        """
        known = set(self._store.installed())
        try:
            waits = self._bring_into_use(attempt, before)
        except LamplighterError as error:
            return self._fail(attempt, error, known)
        except MemoryError:
            where = f"{attempt.desired}: no memory while {attempt.step.value}"
            return self._fail(attempt, MemoryShortError(where, hint="it is tried again later"), known)
        except Exception as error:
            # The boundary of an update: a defect in it or in a hook must not leave the fleet waiting for its end.
            logger.exception("the update to %s ended by a defect", attempt.desired)
            return self._fail(attempt, LamplighterError(f"{type(error).__name__}: {error}"), known)
        if waits:
            return attempt.finish(UpdateState.WAITING, message=waits)
        attempt.forget_failure()
        report = attempt.finish(UpdateState.ACTIVE)
        self._tidy()
        return report

    def _bring_into_use(self, attempt: Attempt, before: PackageRef | None) -> str | None:
        """Do the update; return why it must wait if its window is closed."""
        attempt.enter(UpdateState.RECEIVED)
        if attempt.cut_offs > _MAX_CUT_OFFS:
            raise UpdateCutOffError(
                f"{attempt.desired}: cut off by {attempt.cut_offs} restarts", hint="ask for it again under a new id"
            )
        if before == attempt.desired.reference and self._store.is_whole(before):
            return None
        package = self._obtain(attempt)
        if reason := self._must_wait(attempt):
            return reason
        attempt.enter(UpdateState.PREPARING)
        if attempt.interruptions >= _MAX_INTERRUPTIONS:
            raise TrialFailedError(
                f"{package.reference}: the agent was cut off {attempt.interruptions} times while trying it",
                hint="it may need more memory than this device has",
                detail="cut_off",
            )
        interrupt = attempt.interrupt
        interrupt.run(
            partial(self._hooks.prepare, package.path, package.manifest, interrupt),
            f"preparing {package.reference}",
            grace_s=self._options.hook_grace_s,
        )
        attempt.enter(UpdateState.TRYING)
        measurement = interrupt.run(
            partial(self._hooks.trial, package.path, package.manifest, interrupt),
            f"trying {package.reference}",
            grace_s=self._options.hook_grace_s,
        )
        limits = (attempt.desired.policy.limits, self._options.limits)
        verdict = judge_trial(package.manifest, measurement, *limits)
        if not verdict.passed:
            raise TrialFailedError(f"{package.reference}: {verdict.code}: {verdict.message}", detail=verdict.code)
        self._activate(attempt, package.reference, before)
        return None

    def _activate(self, attempt: Attempt, reference: PackageRef, before: PackageRef | None) -> None:
        attempt.enter(UpdateState.ACTIVATING)
        if before != reference:
            probation = Probation(
                reference=reference,
                before=before,
                manifest_sha256=attempt.manifest_sha256,
                desired=attempt.desired,
            )
            self._probation.begin(probation)
        try:
            self._store.activate(reference)
            switch(self._hooks, reference, attempt.interrupt, self._options.hook_grace_s)
        except Exception as error:
            # Whatever kept the service from switching, defects included, the link must not name what it does not run.
            if before != reference:
                self._store.return_to(before)
                self._probation.end()
            attempt.switched_back = not isinstance(error, StoreError)
            raise

    def _fail(self, attempt: Attempt, error: LamplighterError, known: set[PackageRef]) -> UpdateReport:
        """End an update that did not succeed, and remove a package that it brought and that is not wanted again."""
        cancelled = isinstance(error, UpdateCancelledError)
        if cancelled and attempt.interrupt.cause == "suspended":
            return attempt.suspend()
        passing = cancelled or isinstance(error, StoreError | MemoryShortError)
        tried = attempt.step in RISKY_STATES and not passing
        if tried:
            attempt.remember_failure(error.message)
        lasting = tried or cancelled or isinstance(error, UpdateCutOffError | WindowMissedError)
        report = attempt.finish(_end_of(attempt, error), error=error, again=not lasting)
        if tried or attempt.step is UpdateState.VERIFYING:
            self._discard_new(attempt.desired.reference, known)
        if tried:
            self._tidy()
        return report

    def _must_wait(self, attempt: Attempt) -> str | None:
        """Return why the update must wait, or None.

        Raises:
            WindowMissedError: If it has waited too long.
        """
        if self._plan.closed_for_s(attempt.desired) == 0:
            return None
        moment = self._plan.now()
        attempt.waiting_since = attempt.waiting_since or moment
        waited_s = (moment - attempt.waiting_since).total_seconds()
        if attempt.warning is None and waited_s > self._options.deadlines.waiting_s:
            raise WindowMissedError(
                f"{attempt.desired}: its window did not come in {waited_s / 86_400:.0f} days",
                hint="ask for it again, with policy.urgent or another policy.window",
            )
        return f"{attempt.desired} is here and waits for its window, {self._plan.window_of(attempt.desired)}"

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


def switch(hooks: UpdateHooks, reference: PackageRef, interrupt: Interrupt, grace_s: float) -> None:
    """Have the service switch over; a switch that does not end in time is left behind.

    Raises:
        UpdateDeadlineError: If its time passed.
        UpdateCancelledError: If the agent ends.
        Exception: Whatever kept the service from switching.
    """
    interrupt.run(partial(hooks.activate, reference, interrupt), f"activating {reference}", grace_s=grace_s)


def _end_of(attempt: Attempt, error: LamplighterError) -> UpdateState:
    if isinstance(error, UpdateCancelledError):
        return UpdateState.CANCELLED
    if attempt.switched_back:
        return UpdateState.ROLLED_BACK
    if attempt.step in {UpdateState.RECEIVED, UpdateState.CHECKING} and isinstance(error, PackageError):
        return UpdateState.REJECTED
    return UpdateState.FAILED
