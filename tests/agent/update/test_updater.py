from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.errors import (
    DiskFullError,
    ExpiredMetadataError,
    HashMismatchError,
    HttpError,
    IncompatiblePackageError,
    LamplighterError,
    MissingFileError,
    RollbackError,
    SignatureError,
    StoreError,
    TrialFailedError,
    TruncatedDownloadError,
    UnknownPackageError,
    UpdateCancelledError,
    WorkerError,
)
from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.update.audit import AUDIT_NAME, AuditLog
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.journal import JOURNAL_NAME
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.sources import DirectorySource
from lamplighter_agent.update.states import PackageRef, TrialLimits, UpdatePolicy, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.updater import Updater
from lamplighter_fleet.keys import create_keys
from lamplighter_fleet.publish import allow_downgrade
from lamplighter_fleet.repository import Expiry
from support.package_server import Fault
from support.packages import CHUNK_BYTES, WEIGHTS_BYTES
from support.update_world import DEVICE, PATIENT, PowerCut, World, desired

FIRST, SECOND = PackageRef("tiny", "1.0.0"), PackageRef("tiny", "2.0.0")
COURSE = [state for state in UpdateState if state is not UpdateState.WAITING]  # that one only with a window


def blob_of(world: World, version: str, name: str) -> str:
    tree = msgspec.json.decode((world.path / "built" / version / "manifest.json").read_bytes())
    digest = next(entry["sha256"] for entry in tree["files"] if entry["name"] == name)
    return f"/blobs/sha256/{digest}"


def suspend_at(updater: Updater, at: UpdateState) -> Callable[[UpdateReport], None]:
    return lambda report: updater.suspend() if report.state is at else None


def check_untouched(world: World) -> None:
    """The first package is in use, whole, and nobody was told to switch."""
    current = world.store.current()
    assert current is not None
    assert current.reference == FIRST
    world.store.verify(current)
    assert world.service.activated == []


def test_package_goes_all_the_way(world: World) -> None:
    world.publish()
    outcome = world.updater().apply(desired())
    assert outcome.succeeded
    assert outcome.changed
    assert world.service.states() == [
        "received", "checking", "downloading", "verifying", "preparing", "trying", "activating", "active",
    ]  # fmt: skip
    assert world.current() == "tiny/1.0.0"
    current = world.store.current()
    assert current is not None
    assert world.service.prepared == world.service.tried == [current.path]
    assert world.service.activated == ["tiny/1.0.0"]
    assert outcome.report.active == "tiny/1.0.0"
    assert outcome.report.bytes_done == outcome.report.bytes_total == current.manifest.total_bytes


def test_package_comes_from_a_directory_as_well(world: World) -> None:
    world.publish()
    outcome = world.updater(source=DirectorySource(world.repository_dir)).apply(desired())
    assert outcome.succeeded
    assert world.server.exchanges == []


def test_second_version_fetches_only_what_changed(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    assert world.updater().apply(desired("2.0.0", id="two")).succeeded
    assert world.server.body_bytes("/blobs/") == WEIGHTS_BYTES
    assert world.store.installed() == (FIRST, SECOND)


def test_one_update_shows_progress(world: World) -> None:
    world.publish()
    world.updater().apply(desired())
    shown = [report.bytes_done for report in world.service.reports if report.state is UpdateState.DOWNLOADING]
    assert shown == sorted(shown)
    assert shown[-1] == world.service.reports[-1].bytes_total


def flip_weights(world: World) -> None:
    world.server.faults.append(Fault(blob_of(world, "2.0.0", WEIGHTS_NAME), flip_at=5 * CHUNK_BYTES))


def remove_weights(world: World) -> None:
    (world.repository_dir / blob_of(world, "2.0.0", WEIGHTS_NAME).lstrip("/")).unlink()


def truncate_weights(world: World) -> None:
    world.server.faults.append(Fault(blob_of(world, "2.0.0", WEIGHTS_NAME), cut_after=0))


def refuse_weights(world: World) -> None:
    world.server.faults.append(Fault(blob_of(world, "2.0.0", WEIGHTS_NAME), status=403))


def flip_manifest(world: World) -> None:
    world.server.faults.append(Fault("/targets/tiny/2.0.0/", flip_at=100))


def take_away_signature(world: World) -> None:
    other = world.path / "other-keys"
    create_keys(other)
    world.keys = type(world.keys)(other)
    shutil.rmtree(world.repository_dir / "metadata")
    built = world.path / "built"
    shutil.rmtree(built / "2.0.0")
    world.publish("2.0.0", weights_seed=2)


def expire(world: World) -> None:
    world.repository(Expiry(timestamp_days=-1)).refresh()


def go_back_in_time(world: World) -> None:
    # The store has seen a newer timestamp than the one that is shown now.
    shown = (world.repository_dir / "metadata" / "timestamp.json").read_bytes()
    world.repository().refresh()
    world.updater().packages()
    (world.repository_dir / "metadata" / "timestamp.json").write_bytes(shown)


def switch_server_off(world: World) -> None:
    world.server.faults.append(Fault("/metadata/", status=503))


FAULTS: list[tuple[Callable[[World], None], type[LamplighterError], UpdateState, str]] = [
    (flip_weights, HashMismatchError, UpdateState.FAILED, WEIGHTS_NAME),
    (remove_weights, MissingFileError, UpdateState.FAILED, WEIGHTS_NAME),
    (truncate_weights, TruncatedDownloadError, UpdateState.FAILED, WEIGHTS_NAME),
    (refuse_weights, HttpError, UpdateState.FAILED, WEIGHTS_NAME),
    (flip_manifest, HashMismatchError, UpdateState.REJECTED, "targets/tiny/2.0.0/"),
    (take_away_signature, SignatureError, UpdateState.REJECTED, "metadata/timestamp.json"),
    (expire, ExpiredMetadataError, UpdateState.REJECTED, "metadata/timestamp.json"),
    (go_back_in_time, RollbackError, UpdateState.REJECTED, "metadata/timestamp.json"),
    (switch_server_off, HttpError, UpdateState.FAILED, "metadata/2.root.json"),
]


@pytest.mark.parametrize(("fault", "error", "state", "file"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_fault_leaves_the_running_package_and_is_reported(
    world: World, fault: Callable[[World], None], error: type[LamplighterError], state: UpdateState, file: str
) -> None:
    world.install()
    root = world.keys.root()
    world.publish("2.0.0", weights_seed=2)
    fault(world)
    world.forget()
    outcome = world.updater(root=root).apply(desired("2.0.0", id="two"))
    report = outcome.report
    assert (report.state, report.reason) == (state, error.reason)
    assert report == world.service.reports[-1]
    assert file in (report.file or "")
    assert file in (report.message or "") or report.file == WEIGHTS_NAME
    assert report.active == "tiny/1.0.0"
    assert not outcome.changed
    check_untouched(world)
    assert world.store.installed() == (FIRST,)


def test_package_that_nobody_signed_is_rejected(world: World) -> None:
    world.install()
    report = world.updater().apply(desired("9.9.9", id="two")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, UnknownPackageError.reason)
    assert "1.0.0" in (report.hint or "")
    check_untouched(world)


def test_name_that_is_a_path_is_rejected_before_anything_is_asked(world: World) -> None:
    report = world.updater().apply(desired("../../etc")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, "manifest_invalid")
    assert world.server.exchanges == []


def test_incompatible_package_costs_no_weights(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2, change=lambda tree: tree["target"].update(min_onnxruntime="99.0"))
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, IncompatiblePackageError.reason)
    assert world.server.body_bytes("/blobs/") == 0
    check_untouched(world)


def test_package_that_does_not_fit_costs_no_weights(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    full = Store(world.path / "state", reserve_bytes=2**60)
    report = world.updater(store=full).apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.FAILED, DiskFullError.reason)
    assert world.server.body_bytes("/blobs/") == 0
    check_untouched(world)


def test_lower_version_needs_the_signers_permission(world: World) -> None:
    world.publish()
    world.install("2.0.0", weights_seed=2)
    assert Ledger.open(world.path / "state").probation.note_serving(10_000.0) == "passed"
    report = world.updater().apply(desired("1.0.0", id="back")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, RollbackError.reason)
    assert "allow-downgrade" in (report.hint or "")
    assert world.server.body_bytes("/blobs/") == 0
    allow_downgrade("tiny/1.0.0", "2.0.0", world.repository())
    assert world.updater().apply(desired("1.0.0", id="again")).succeeded
    assert "downgrade_permitted" in [entry.event for entry in AuditLog(world.path / "state" / AUDIT_NAME).read()]


def test_failed_self_test_keeps_the_old_package_and_removes_the_new(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.measurement = msgspec.structs.replace(world.service.measurement, self_test_tokens=((3, 9, 9),))
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.FAILED, TrialFailedError.reason)
    assert "self_test_mismatch" in (report.message or "")
    check_untouched(world)
    assert world.store.installed() == (FIRST,)
    assert not (world.store.blobs.directory / Path(blob_of(world, "2.0.0", WEIGHTS_NAME)).name).exists()


def test_limits_of_the_operator_count(world: World) -> None:
    world.publish()
    policy = UpdatePolicy(limits=TrialLimits(min_generated_tokens_per_s=1000.0))
    report = world.updater().apply(desired(policy=policy)).report
    assert (report.state, report.reason) == (UpdateState.FAILED, TrialFailedError.reason)
    assert world.current() is None


def test_crashed_candidate_is_a_failed_update(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.trial_error = WorkerError("the worker ended with signal 11")
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.FAILED, WorkerError.reason)
    check_untouched(world)


def test_defect_in_a_hook_ends_the_update_as_failed(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.prepare_error = ZeroDivisionError("a defect")
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert report.state is UpdateState.FAILED
    assert "ZeroDivisionError" in (report.message or "")
    check_untouched(world)


def test_service_that_cannot_switch_is_rolled_back(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.activate_error = WorkerError("the new worker died while switching")
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.ROLLED_BACK, WorkerError.reason)
    check_untouched(world)


def test_first_package_that_cannot_be_switched_on_leaves_none(world: World) -> None:
    world.publish()
    world.service.activate_error = WorkerError("the worker died")
    report = world.updater().apply(desired()).report
    assert report.state is UpdateState.ROLLED_BACK
    assert world.current() is None


def test_failed_version_is_not_tried_again(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.trial_error = TrialFailedError("bad")
    world.updater().apply(desired("2.0.0", id="two"))
    world.service.trial_error = None
    world.forget()
    report = world.updater().apply(desired("2.0.0", id="three")).report
    assert (report.state, report.reason) == (UpdateState.REJECTED, TrialFailedError.reason)
    assert world.service.tried == []
    assert world.server.body_bytes("/blobs/") == 0


def test_failed_version_is_tried_again_when_the_operator_says_so(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.trial_error = TrialFailedError("bad")
    world.updater().apply(desired("2.0.0", id="two"))
    world.service.trial_error = None
    policy = UpdatePolicy(retry_failed=True)
    assert world.updater().apply(desired("2.0.0", id="three", policy=policy)).succeeded
    # It works now, so that it is no longer held against it.
    world.updater().rollback()
    assert world.updater().apply(desired("2.0.0", id="four")).succeeded


def test_ended_request_has_its_result_told_again(world: World) -> None:
    world.install()
    world.server.faults.append(Fault("/", status=500))
    outcome = world.updater().apply(desired("1.0.0", id="install-1.0.0"))
    assert outcome.succeeded
    assert not outcome.changed
    assert [report.state for report in world.service.reports] == [UpdateState.ACTIVE]


def test_package_in_use_is_wanted_again(world: World) -> None:
    world.install()
    outcome = world.updater().apply(desired("1.0.0", id="again"))
    assert outcome.succeeded
    assert not outcome.changed
    assert world.service.tried == []
    assert world.server.exchanges == []


def test_damaged_package_in_use_is_repaired(world: World) -> None:
    world.install()
    current = world.store.current()
    assert current is not None
    weights = current.path / WEIGHTS_NAME
    damaged = bytearray(weights.read_bytes())
    damaged[0] ^= 1
    weights.write_bytes(bytes(damaged))
    assert world.updater().apply(desired("1.0.0", id="repair")).succeeded
    world.store.verify(current)
    assert world.server.body_bytes(blob_of(world, "1.0.0", WEIGHTS_NAME)) == WEIGHTS_BYTES
    assert world.server.body_bytes(blob_of(world, "1.0.0", MODEL_NAME)) == 0


def test_passing_failure_is_tried_again_and_goes_on_where_it_stopped(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    weights = blob_of(world, "2.0.0", WEIGHTS_NAME)
    world.server.faults.append(Fault(weights, times=1, cut_after=10 * CHUNK_BYTES + 5))
    world.server.faults.append(Fault(weights, times=3, status=503))
    world.updater().apply(desired("2.0.0", id="two"))
    assert world.current() == "tiny/1.0.0"
    outcome = world.updater().resume()
    assert outcome is not None
    assert outcome.succeeded
    assert world.server.requests(weights)[-1].range == f"bytes={10 * CHUNK_BYTES}-"


@pytest.mark.parametrize("at", [state for state in COURSE if not state.is_final], ids=lambda state: str(state.value))
def test_update_cut_off_in_any_state_goes_on_after_a_restart(world: World, at: UpdateState) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)

    def cut(report: UpdateReport) -> None:
        if report.state is at:
            raise PowerCut

    world.service.on_report = cut
    with pytest.raises(PowerCut):
        world.updater().apply(desired("2.0.0", id="two"))
    check_untouched(world)
    world.service.on_report = lambda report: None
    outcome = world.updater().resume()
    assert outcome is not None
    assert outcome.succeeded
    assert outcome.report.id == "two"
    assert world.current() == "tiny/2.0.0"
    assert world.updater().resume() is None


def test_package_that_keeps_cutting_the_agent_off_is_given_up(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.service.trial_error = PowerCut()
    for _ in range(3):
        with pytest.raises(PowerCut):
            world.updater().apply(desired("2.0.0", id="two"))
    outcome = world.updater().resume()
    assert outcome is not None
    assert (outcome.report.state, outcome.report.reason) == (UpdateState.FAILED, TrialFailedError.reason)
    assert world.updater().resume() is None
    check_untouched(world)


def test_cancel_ends_a_download_and_keeps_what_came(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    world.server.faults.append(Fault(blob_of(world, "2.0.0", WEIGHTS_NAME), drip_s=0.005, drip_bytes=1024))
    interrupt = Interrupt()

    def cancel(report: UpdateReport) -> None:
        if report.bytes_done > CHUNK_BYTES * 4 and report.state is UpdateState.DOWNLOADING:
            interrupt.cancel()

    world.service.on_report = cancel
    report = world.updater().apply(desired("2.0.0", id="two"), interrupt=interrupt).report
    assert (report.state, report.reason) == (UpdateState.CANCELLED, UpdateCancelledError.reason)
    check_untouched(world)
    assert list(world.store.blobs.directory.glob("*.part"))
    assert world.updater().resume() is None


def test_package_being_activated_is_no_longer_cancelled(world: World) -> None:
    world.publish()
    interrupt, heard = Interrupt(), []
    world.service.on_report = lambda r: heard.append(interrupt.cancel()) if r.state is UpdateState.ACTIVATING else None
    assert world.updater().apply(desired(), interrupt=interrupt).succeeded
    assert heard == [False]


@pytest.mark.parametrize("at", [UpdateState.DOWNLOADING, UpdateState.PREPARING], ids=lambda state: str(state.value))
def test_update_at_work_when_the_agent_stops_goes_on_with_the_next(world: World, at: UpdateState) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    for _ in range(4):  # more often than a package may cut the agent off
        updater = world.updater()
        world.service.on_report = suspend_at(updater, at)
        outcome = updater.apply(desired("2.0.0", id="two"))
        assert not outcome.report.state.is_final
        check_untouched(world)
    world.service.on_report = lambda report: None
    resumed = world.updater().resume()
    assert resumed is not None
    assert resumed.succeeded


def test_suspended_updater_begins_nothing(world: World) -> None:
    world.publish()
    updater = world.updater()
    updater.suspend()
    assert not updater.apply(desired()).succeeded
    assert world.server.exchanges == []


def test_rollback_goes_to_the_previous_package(world: World) -> None:
    world.install()
    world.install("2.0.0", weights_seed=2)
    outcome = world.updater().rollback()
    assert outcome.report.state is UpdateState.ROLLED_BACK
    assert outcome.report.active == "tiny/1.0.0"
    check = world.store.current()
    assert check is not None
    assert check.reference == FIRST
    assert world.service.activated == ["tiny/1.0.0"]
    # The request that had brought the second version does not claim any more that it is in use.
    again = world.updater().apply(desired("2.0.0", id="install-2.0.0"))
    assert again.report.state is UpdateState.ROLLED_BACK


def test_rollback_without_a_previous_package_is_refused(world: World) -> None:
    world.install()
    with pytest.raises(UnknownPackageError):
        world.updater().rollback()
    check_untouched(world)


def test_rollback_to_a_damaged_package_is_refused(world: World) -> None:
    world.install()
    world.install("2.0.0", weights_seed=2)
    previous = world.store.previous()
    assert previous is not None
    (previous.path / WEIGHTS_NAME).unlink()
    with pytest.raises(MissingFileError):
        world.updater().rollback()
    assert world.current() == "tiny/2.0.0"


def test_service_that_cannot_roll_back_stays(world: World) -> None:
    world.install()
    world.install("2.0.0", weights_seed=2)
    world.service.activate_error = WorkerError("no memory")
    with pytest.raises(WorkerError):
        world.updater().rollback()
    assert world.current() == "tiny/2.0.0"


def test_only_so_many_packages_are_kept(world: World) -> None:
    for number in range(1, 5):
        world.install(f"{number}.0.0", weights_seed=number)
    assert world.store.installed() == (PackageRef("tiny", "3.0.0"), PackageRef("tiny", "4.0.0"))
    previous = world.store.previous()
    assert previous is not None
    assert previous.reference == PackageRef("tiny", "3.0.0")


def test_pull_brings_a_package_and_leaves_it_off(world: World) -> None:
    world.publish()
    package = world.updater().pull(FIRST)
    world.store.verify(package)
    assert world.current() is None
    assert world.service.tried == []
    assert not (world.path / "state" / JOURNAL_NAME).exists()


def test_pull_raises_what_is_wrong(world: World) -> None:
    world.publish()
    with pytest.raises(UnknownPackageError):
        world.updater().pull(SECOND)


def test_second_updater_is_refused(world: World) -> None:
    world.publish()
    with world.store.lock(), pytest.raises(StoreError, match="another update"):
        world.updater().apply(desired())


def test_damaged_journal_is_no_reason_to_stop(world: World) -> None:
    world.install()
    (world.path / "state" / JOURNAL_NAME).write_bytes(b'{"record": 7}')
    assert world.updater().resume() is None
    assert world.updater().apply(desired("1.0.0", id="x")).succeeded


def test_device_with_other_facts_is_asked(world: World) -> None:
    world.publish(change=lambda tree: tree["target"].update(execution_provider="cuda"))
    report = world.updater(device=DEVICE, download=PATIENT).apply(desired()).report
    assert report.reason == IncompatiblePackageError.reason
