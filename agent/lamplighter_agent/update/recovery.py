"""What brings a box back by itself: a damaged package in use, and one that fails its probation.

`start_up` runs before the engine is started, so that a package that takes the whole device down is gone from
``current`` before it is loaded again. All of it needs only what is on the disk, no repository and no network.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import msgspec

from lamplighter_agent.errors import (
    HashMismatchError,
    LamplighterError,
    ProbationFailedError,
    StoreError,
    UnstableError,
)
from lamplighter_agent.update.audit import AuditEntry
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.journal import FailedVersion, UpdateRecord
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.probation import Probation
from lamplighter_agent.update.states import Desired, PackageRef, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store

logger = logging.getLogger(__name__)


class StartUp(NamedTuple):
    """What to do at the agent's start.

    Attributes:
        package: The package to run, or None.
        report: What there is to tell the fleet, or None.
    """

    package: InstalledPackage | None
    report: UpdateReport | None


class Turn(NamedTuple):
    """Another package takes the place of the one in use.

    Attributes:
        report: What there is to tell the fleet.
        package: What is to serve now, as good as it is, or None if there is nothing. The store names it too, unless
            its disk refused.
    """

    report: UpdateReport
    package: PackageRef | None


def start_up(store: Store, ledger: Ledger, *, unstable: bool = False) -> StartUp:
    """Decide which package to run, before any is loaded: count the start, roll back and heal where needed.

    Whatever is wrong with the store, the best package that can be read is returned. The caller holds no lock.

    Args:
        store: The packages.
        ledger: What is remembered.
        unstable: True if the agent did not stay up several times in a row: the package in use may be why.
    """
    turn = None
    try:
        with store.lock():
            if _count_start(store, ledger) or (unstable and ledger.probation.probation is not None):
                turn = end_failed_probation(store, ledger)
            elif unstable:
                turn = leave_unstable(store, ledger)
            turn = heal(store, ledger, thorough=False) or turn
    except StoreError as error:
        logger.error("the store cannot be put in order: %s", error.message)  # noqa: TRY400
    report, reference = (None, store.in_use()) if turn is None else turn
    if reference is None or not store.is_complete(reference):
        return StartUp(None, report)
    return StartUp(store.package(reference), report)


def end_failed_probation(store: Store, ledger: Ledger) -> Turn | None:
    """Go back from the package on probation to the one before it, and remember that it failed.

    The caller holds the store's lock, and switches the service where one runs. A disk that refuses is no reason to go
    on with a package that fails: the next start comes here again. Where there is no other package, this one stays.

    Returns:
        What serves now, or None if no package is on probation.
    """
    probation = ledger.probation.probation
    if probation is None:
        return None
    fallback = probation.before if probation.before and store.is_whole(probation.before) else None
    fallback = fallback or _best_other(store, probation.reference)
    error = ProbationFailedError(
        f"{probation.reference} failed {probation.failures} times within its probation, the last time: "
        f"{probation.last_failure}; {f'{fallback} is in use instead' if fallback else 'there is no other to use'}",
        hint="publish a repaired version; this one is tried again only with policy.retry_failed",
    )
    state = UpdateState.FAILED if fallback is None else UpdateState.ROLLED_BACK
    serving = fallback or probation.reference
    report = _report(probation.desired, state, error, serving)
    try:
        if fallback is not None:
            store.return_to(fallback)
        _remember_failure(ledger, probation, report)
        # Last: a power cut before this comes here again.
        ledger.probation.end()
    except StoreError as refused:
        logger.error("the way back is not kept: %s", refused.message)  # noqa: TRY400
    _note(ledger, probation, report)
    return Turn(report, serving)


def _remember_failure(ledger: Ledger, probation: Probation, report: UpdateReport) -> None:
    state = ledger.journal.read()
    failed = FailedVersion(
        reference=probation.reference, manifest_sha256=probation.manifest_sha256, message=probation.last_failure
    )
    state = state.with_failure(failed)
    if state.record is not None and state.record.desired == probation.desired:
        state = msgspec.structs.replace(state, record=UpdateRecord(desired=probation.desired, report=report))
    ledger.journal.write(state)


def leave_unstable(store: Store, ledger: Ledger) -> Turn | None:
    """Go back to the package before the one in use, with which the agent does not stay up.

    The caller holds the store's lock.

    Returns:
        What serves now, or None if there is nothing whole to go back to.

    Raises:
        StoreError: If the file system refuses.
    """
    left, fallback = store.in_use(), store.previous_reference()
    if left is None or fallback is None or fallback == left or not store.is_whole(fallback):
        return None
    error = UnstableError(
        f"the agent did not stay up with {left}; {fallback} is in use instead",
        hint="see the agent's log; push the package again, under a new id, to try it again",
    )
    state = ledger.journal.read()
    desired = state.record.desired if state.record else None
    if desired is None or str(desired) != str(left):
        desired = Desired(package=left.name, version=left.version, id="unstable", requested_by="agent")
        state = state.without_record()
    report = _report(desired, UpdateState.ROLLED_BACK, error, fallback)
    store.return_to(fallback)
    # Told again, the request that brought the package must not bring it back.
    ledger.journal.write(msgspec.structs.replace(state, record=UpdateRecord(desired=desired, report=report)))
    ledger.audit.write(
        AuditEntry(event="rolled_back", package=str(left), requested_by="agent", active=str(fallback),
                   reason=error.reason, message=error.message)
    )  # fmt: skip
    logger.error("%s", error.message)
    return Turn(report, fallback)


def heal(store: Store, ledger: Ledger, *, thorough: bool) -> Turn | None:
    """Take another package into use if the one in use is damaged; the update that brought it is done again.

    The caller holds the store's lock, and switches the service where one runs.

    Args:
        store: The packages.
        ledger: What is remembered.
        thorough: Hash every file; otherwise look at lengths only, which takes no time at a start.

    Returns:
        What serves now, or None if nothing was damaged.

    Raises:
        StoreError: If the file system refuses.
    """
    damaged = store.in_use()
    if damaged is None:
        if not store.has_current_entry():
            return None
    elif store.is_whole(damaged) if thorough else store.is_complete(damaged):
        return None
    fallback = _best_other(store, damaged)
    if damaged is None or fallback is not None:
        store.return_to(fallback)
    what = f"the package in use, {damaged}," if damaged else "the link to the package in use"
    error = HashMismatchError(f"{what} is damaged on this device; {fallback or 'nothing'} serves instead")
    state = ledger.journal.read()
    desired = state.record.desired if state.record else None
    if damaged is not None and (desired is None or str(desired) != str(damaged)):
        desired = Desired(package=damaged.name, version=damaged.version, id="repair", requested_by="agent")
    if desired is None:
        return None
    report = _report(desired, UpdateState.FAILED, error, fallback)
    record = UpdateRecord(desired=desired, report=report, again=True)
    if state.record is None or state.record.report.state.is_final:
        ledger.journal.write(msgspec.structs.replace(state.without_record(), record=record))
    if ledger.probation.probation is not None and ledger.probation.probation.reference != store.in_use():
        ledger.probation.end()
    entry = AuditEntry(event="damaged", package=str(desired), reason=error.reason, message=error.message)
    ledger.audit.write(entry)
    logger.error("%s", error.message)
    return Turn(report, fallback or damaged)


def _count_start(store: Store, ledger: Ledger) -> bool:
    """Count this start against a package on probation; True if that was one too many."""
    probation = ledger.probation.probation
    if probation is None:
        return False
    if probation.reference != store.in_use():
        # A crash between the beginning of the probation and the activation, or after a rollback.
        ledger.probation.end()
        return False
    return ledger.probation.note_start() == "failed"


def _best_other(store: Store, damaged: PackageRef | None) -> PackageRef | None:
    """Return the whole package that was in use before, or the newest whole one, other than a damaged one."""
    candidates = [store.previous_reference(), *store.newest(len(store.installed()))]
    for candidate in candidates:
        if candidate is not None and candidate != damaged and store.is_whole(candidate):
            return candidate
    return None


def _report(desired: Desired, state: UpdateState, error: LamplighterError, active: PackageRef | None) -> UpdateReport:
    return UpdateReport(
        id=desired.id,
        state=state,
        package=desired.package,
        version=desired.version,
        active=str(active) if active else None,
        reason=error.reason,
        message=error.message,
        hint=error.hint,
    )


def _note(ledger: Ledger, probation: Probation, report: UpdateReport) -> None:
    entry = AuditEntry(
        event=report.state.value,
        package=str(probation.reference),
        requested_by="agent",
        request=probation.desired.id,
        active=report.active,
        reason=report.reason,
        message=report.message,
    )
    ledger.audit.write(entry)
    logger.error("%s", report.message)
