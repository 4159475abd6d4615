"""The pure rules of clocks, windows and versions, and the two small files beside the journal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.errors import ClockError, ExpiredMetadataError, MetadataError, RollbackError
from lamplighter_agent.update import recovery
from lamplighter_agent.update.audit import AuditEntry, AuditLog
from lamplighter_agent.update.clock import RELEASED, judge_clock
from lamplighter_agent.update.downgrade import DowngradePermission, check_downgrade, read_permission, version_key
from lamplighter_agent.update.journal import Journal
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.probation import Probation, ProbationBook, ProbationRules
from lamplighter_agent.update.states import Desired, PackageRef, UpdateState
from lamplighter_agent.update.window import Window
from lamplighter_fleet.repository import Expiry
from support.update_world import World, desired

TODAY = datetime(2026, 11, 24, 12, tzinfo=UTC)
ONE, TWO = PackageRef("tiny", "1.0.0"), PackageRef("tiny", "2.0.0")


@pytest.mark.parametrize(
    ("shown", "confirmed", "code"),
    [
        (TODAY, None, "ok"),
        (TODAY, TODAY - timedelta(days=300), "ok"),
        (TODAY, TODAY + timedelta(hours=20), "ok"),
        (datetime(1970, 1, 1, tzinfo=UTC), None, "clock_behind"),
        (datetime(1970, 1, 1, tzinfo=UTC), TODAY, "clock_behind"),
        (TODAY - timedelta(days=30), TODAY, "clock_behind"),
        (TODAY + timedelta(days=3650), TODAY, "clock_ahead"),
        (RELEASED + timedelta(days=3660), None, "clock_ahead"),
    ],
)
def test_clock_is_judged(shown: datetime, confirmed: datetime | None, code: str) -> None:
    verdict = judge_clock(shown, confirmed)
    assert verdict.code == code
    assert verdict.passed == max(RELEASED, confirmed or RELEASED)


def test_clock_in_1970_is_reported_and_stops_nothing(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    outcome = world.updater(now=lambda: datetime(1970, 1, 1, tzinfo=UTC)).apply(desired("2.0.0", id="two"))
    assert outcome.succeeded
    assert outcome.report.warning == "clock_behind"
    assert "clock_behind" in [entry.event for entry in AuditLog(world.path / "state" / "audit.jsonl").read()]


def test_clock_in_1970_does_not_make_expired_metadata_good_again(world: World) -> None:
    """The device has seen a later time; the clock that python-tuf asks is the test's own, so the floor must tell."""
    world.install()
    journal = Journal(world.path / "state" / "update.json")
    later = datetime.now(UTC) + timedelta(days=200)
    journal.write(msgspec.structs.replace(journal.read(), clock_confirmed=later))
    world.publish("2.0.0", weights_seed=2)
    report = world.updater(now=lambda: datetime(1970, 1, 1, tzinfo=UTC)).apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, ExpiredMetadataError.reason)
    assert (report.warning, report.active) == ("clock_behind", "tiny/1.0.0")


def test_clock_ten_years_ahead_is_named_as_the_cause(world: World) -> None:
    world.install()
    world.repository(Expiry(timestamp_days=-1)).refresh()  # as everything looks to such a clock
    ahead = datetime.now(UTC) + timedelta(days=3650)
    report = world.updater(now=lambda: ahead).apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason, report.warning) == (UpdateState.FAILED, ClockError.reason, "clock_ahead")
    assert report.active == "tiny/1.0.0"


@pytest.mark.parametrize(
    ("window", "time", "seconds"),
    [
        ("02:00-05:00", "02:00", 0),
        ("02:00-05:00", "04:59", 0),
        ("02:00-05:00", "05:00", 21 * 3600),
        ("02:00-05:00", "01:30", 1800),
        ("22:00-04:00", "23:00", 0),
        ("22:00-04:00", "03:59", 0),
        ("22:00-04:00", "04:00", 18 * 3600),
        ("06:00-06:00", "13:00", 0),
    ],
)
def test_window_opens_at_its_time(window: str, time: str, seconds: int) -> None:
    moment = TODAY.replace(hour=int(time[:2]), minute=int(time[3:]))
    assert Window.parse(window).seconds_until_open(moment) == seconds


@given(begin=st.integers(0, 1439), end=st.integers(0, 1439), minute=st.integers(0, 1439))
def test_window_is_open_when_it_says_it_will_be(begin: int, end: int, minute: int) -> None:
    window = Window.parse(f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}")
    moment = TODAY.replace(hour=minute // 60, minute=minute % 60)
    wait_s = window.seconds_until_open(moment)
    assert 0 <= wait_s < 86_400
    assert window.seconds_until_open(moment + timedelta(seconds=wait_s)) == 0


@pytest.mark.parametrize(
    "order", [("1.0.0-rc1", "1.0.0", "1.0.1"), ("1.9", "1.10"), ("2", "10"), ("2026.1", "2026.11"), ("1.0a", "1.0b")]
)
def test_versions_are_ordered(order: tuple[str, ...]) -> None:
    assert sorted(order, key=version_key) == list(order)


def test_downgrade_needs_a_permission_for_just_that_version() -> None:
    check_downgrade(ONE, None, DowngradePermission())
    check_downgrade(TWO, "1.0.0", DowngradePermission())
    check_downgrade(ONE, "2.0.0", DowngradePermission(replaces=("2.0.0",)))
    with pytest.raises(RollbackError, match=r"older than tiny/2\.0\.0"):
        check_downgrade(ONE, "2.0.0", DowngradePermission(replaces=("3.0.0",)))


@pytest.mark.parametrize("custom", [7, "x", {"lamplighter": 1}, {"lamplighter": {"replaces": "2.0.0"}}])
def test_permission_that_makes_no_sense_is_refused(custom: object) -> None:
    with pytest.raises(MetadataError):
        read_permission(custom)


def probation(**changes: object) -> Probation:
    value = Probation(
        reference=TWO, before=ONE, manifest_sha256="m", desired=Desired(package="tiny", version="2.0.0", id="two")
    )
    return msgspec.structs.replace(value, **changes)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    ProbationBook(tmp_path / "probation.json", ProbationRules()).begin(probation())
    return tmp_path / "probation.json"


def test_probation_counts_over_restarts(book: Path) -> None:
    assert [ProbationBook(book).note_start() for _ in range(3)] == ["continues", "continues", "failed"]


def test_power_cut_after_the_package_has_served_is_not_held_against_it(book: Path) -> None:
    for _ in range(10):
        running = ProbationBook(book)
        assert running.note_start() != "failed"
        running.note_serving(40.0)


def test_orderly_stop_is_not_held_against_it(book: Path) -> None:
    for _ in range(10):
        running = ProbationBook(book)
        assert running.note_start() != "failed"
        running.note_stop()


def test_crashes_add_up_with_starts(book: Path) -> None:
    assert ProbationBook(book).note_failure("crashed") == "continues"
    running = ProbationBook(book)
    assert running.note_start() == "continues"
    assert running.note_failure("crashed") == "failed"


def test_probation_is_passed_by_serving(book: Path) -> None:
    running = ProbationBook(book)
    assert running.note_serving(599.0) == "continues"
    assert running.note_serving(1.0) == "passed"
    assert not book.exists()
    assert running.note_failure("later") == "none"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b" " * 100_000])
def test_damaged_probation_is_none(book: Path, content: bytes) -> None:
    book.write_bytes(content)
    assert ProbationBook(book).probation is None


def test_unstable_package_that_had_served_is_left_and_not_brought_back_by_its_wish(world: World) -> None:
    world.install("1.0.0")
    world.install("2.0.0", weights_seed=2)
    ledger = Ledger.open(world.path / "state")
    ledger.probation.note_serving(10_000.0)
    start = recovery.start_up(world.store, ledger, unstable=True)
    assert start.package is not None
    assert start.package.reference == ONE
    assert start.report is not None
    assert (start.report.state, start.report.reason) == (UpdateState.ROLLED_BACK, "agent_unstable")
    report = world.updater().apply(desired("2.0.0", id="install-2.0.0")).report
    assert (report.state, report.active) == (UpdateState.ROLLED_BACK, "tiny/1.0.0")


def test_unstable_package_on_probation_has_failed_it(world: World) -> None:
    world.install("1.0.0")
    world.install("2.0.0", weights_seed=2)
    start = recovery.start_up(world.store, Ledger.open(world.path / "state"), unstable=True)
    assert start.report is not None
    assert (start.report.reason, start.report.active) == ("probation_failed", "tiny/1.0.0")


def test_unstable_package_without_another_stays(world: World) -> None:
    world.install("1.0.0")
    ledger = Ledger.open(world.path / "state")
    ledger.probation.note_serving(10_000.0)
    start = recovery.start_up(world.store, ledger, unstable=True)
    assert start.package is not None
    assert (start.package.reference, start.report) == (ONE, None)


def test_audit_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=2000)
    for number in range(200):
        log.write(AuditEntry(event="requested", request=str(number), message="x" * 10_000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4000 + 1000
    requests = [int(entry.request) for entry in log.read()]
    assert requests == list(range(requests[0], 200))


def test_line_that_a_power_cut_tore_costs_no_other(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write(AuditEntry(event="one"))
    with (tmp_path / "audit.jsonl").open("ab") as stream:
        stream.write(b'{"event":"to')
    log.write(AuditEntry(event="two"))
    assert [entry.event for entry in log.read()] == ["one", "two"]
