"""Every state of an update times every way in which it may be disturbed: what is reported, what is left, what serves.

With ``-s`` the test prints what it found, in the form of the table below.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from lamplighter_agent.errors import HttpError, SignatureError, StoreError, WorkerError
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update import recovery
from lamplighter_agent.update.deadlines import StateDeadlines
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.sources import DirectorySource, SourceStream
from lamplighter_agent.update.states import PackageRef, UpdateReport, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement
from lamplighter_agent.update.updater import Updater
from lamplighter_fleet.keys import KeyDirectory
from lamplighter_fleet.publish import withdraw_package
from support.broken_disk import BrokenDisk
from support.crash_lab import copy_state
from support.package_server import PackageServer
from support.packages import load_manifest
from support.update_world import DEVICE, GOOD_TRIAL, PATIENT, PowerCut, World, desired, make_world

# Reported: the last report. Serves: what answers prompts then. On disk: what is there of the new version. In the end:
# the disturbance is over, the agent has started anew and the wish has come again. Version 1.0.0 is the old one.
TABLE = """
state        disturbance   reported                          serves  on disk   in the end
received     error         failed error                      1.0.0   nothing   active
received     killed        received, then nothing            1.0.0   nothing   active
received     hangs         failed deadline_passed            1.0.0   nothing   active
received     disk full     failed disk_full                  1.0.0   nothing   active
received     read-only     failed store                      1.0.0   nothing   active
received     memory short  failed memory_short               1.0.0   nothing   active
checking     error         rejected signature_invalid        1.0.0   nothing   active
checking     killed        checking, then nothing            1.0.0   nothing   active
checking     hangs         failed deadline_passed            1.0.0   nothing   active
checking     disk full     failed disk_full                  1.0.0   nothing   active
checking     read-only     failed store                      1.0.0   nothing   active
checking     memory short  failed memory_short               1.0.0   nothing   active
downloading  error         failed http_status                1.0.0   nothing   active
downloading  killed        downloading, then nothing         1.0.0   nothing   active
downloading  hangs         failed deadline_passed            1.0.0   nothing   active
downloading  disk full     failed disk_full                  1.0.0   nothing   active
downloading  read-only     failed store                      1.0.0   nothing   active
downloading  memory short  failed memory_short               1.0.0   nothing   active
verifying    error         failed store                      1.0.0   blobs     active
verifying    killed        verifying, then nothing           1.0.0   package   active
verifying    hangs         failed deadline_passed            1.0.0   blobs     active
verifying    disk full     failed disk_full                  1.0.0   package   active
verifying    read-only     failed store                      1.0.0   package   active
verifying    memory short  failed memory_short               1.0.0   blobs     active
waiting      error         rejected package_unknown          1.0.0   package   rejected package_unknown
waiting      killed        waiting, then nothing             1.0.0   package   active
waiting      hangs         failed window_missed              1.0.0   package   failed window_missed
waiting      disk full     waiting                           1.0.0   package   active
waiting      read-only     waiting                           1.0.0   package   active
waiting      memory short  failed memory_short               1.0.0   blobs     active
preparing    error         failed worker_lost                1.0.0   nothing   failed worker_lost
preparing    killed        preparing, then nothing           1.0.0   package   active
preparing    hangs         failed deadline_passed            1.0.0   nothing   failed deadline_passed
preparing    disk full     failed disk_full                  1.0.0   package   active
preparing    read-only     failed store                      1.0.0   package   active
preparing    memory short  failed memory_short               1.0.0   package   active
trying       error         failed worker_lost                1.0.0   nothing   failed worker_lost
trying       killed        trying, then nothing              1.0.0   package   active
trying       hangs         failed deadline_passed            1.0.0   nothing   failed deadline_passed
trying       disk full     failed disk_full                  1.0.0   package   active
trying       read-only     failed store                      1.0.0   package   active
trying       memory short  failed memory_short               1.0.0   package   active
activating   error         rolled_back worker_lost           1.0.0   nothing   rolled_back worker_lost
activating   killed        activating, then nothing          1.0.0   package   active
activating   hangs         rolled_back deadline_passed       1.0.0   nothing   rolled_back deadline_passed
activating   disk full     active                            2.0.0   package   active
activating   read-only     active                            2.0.0   package   active
activating   memory short  rolled_back memory_short          1.0.0   package   active
active       error         rolled_back probation_failed      1.0.0   package   rolled_back probation_failed
active       killed        rolled_back probation_failed      1.0.0   package   rolled_back probation_failed
active       hangs         rolled_back probation_failed      1.0.0   package   rolled_back probation_failed
active       disk full     rolled_back probation_failed      1.0.0   package   active
active       read-only     rolled_back probation_failed      1.0.0   package   active
active       memory short  rolled_back probation_failed      1.0.0   package   rolled_back probation_failed
"""

OLD, NEW = PackageRef("tiny", "1.0.0"), PackageRef("tiny", "2.0.0")
SHORT_S = 0.25
NOON = datetime.now().astimezone().replace(hour=12, minute=0)
WORKING = ("received", "checking", "downloading", "verifying", "waiting", "preparing", "trying", "activating")
DISTURBANCES = ("error", "killed", "hangs", "disk full", "read-only", "memory short")
ERRORS: dict[str, Exception] = {
    "received": ZeroDivisionError("a defect"),
    "checking": SignatureError("metadata/timestamp.json: too few signatures"),
    "downloading": HttpError("a blob: HTTP 403", status=403),
    "verifying": StoreError("reading model.onnx.data: Input/output error"),
    "preparing": WorkerError("preparing ended with signal 11"),
    "trying": WorkerError("the candidate ended with signal 11"),
    "activating": WorkerError("the new worker does not answer"),
}


class Row(NamedTuple):
    """One line of the table."""

    state: str
    disturbance: str
    reported: str
    serves: str
    on_disk: str
    end: str

    def __str__(self) -> str:
        return f"{self.state:12} {self.disturbance:13} {self.reported:33} {self.serves:7} {self.on_disk:9} {self.end}"


def read_table() -> list[Row]:
    lines = TABLE.strip().splitlines()[1:]
    places = [
        TABLE.strip().splitlines()[0].index(word) for word in ("state", "dist", "rep", "serves", "on d", "in the")
    ]
    bounds = list(zip(places, [*places[1:], 200], strict=True))
    return [Row(*(line[begin:end].strip() for begin, end in bounds)) for line in lines]


class Box:
    """A device whose update to version 2.0.0 is disturbed once, in one state."""

    def __init__(self, world: World, disk: BrokenDisk, state: str, disturbance: str) -> None:
        self.world, self.disk = world, disk
        self.state, self.disturbance = state, disturbance
        self.reports: list[UpdateReport] = []
        self.serves: PackageRef | None = OLD
        self.window_opens = threading.Event()
        self.test_ends = threading.Event()
        self.struck = False
        self.days = 0

    def updater(self, ledger: Ledger | None = None) -> Updater:
        """Return the updater of a new process."""
        store = WatchedStore(self.world.path / "state", reserve_bytes=0)
        store.box = self
        deadlines = StateDeadlines()
        if self.disturbance == "hangs" and not self.struck and self.state not in {"waiting", "active"}:
            short = {"checking_s" if self.state == "received" else f"{self.state}_s": SHORT_S}
            deadlines = StateDeadlines(**short)
        options = UpdateOptions(
            download=PATIENT,
            deadlines=deadlines,
            hook_grace_s=0.1,
            window="00:00-01:00" if self.state == "waiting" and not self.window_opens.is_set() else None,
        )
        return Updater(
            store,
            WatchedSource(self.world.repository_dir, self),
            root=self.world.keys.root(),
            device=DEVICE,
            hooks=UpdateHooks(self.prepare, self.trial, self.activate, self.report),
            options=options,
            ledger=ledger,
            now=self.now,
        )

    def strike(self, place: str) -> None:
        """Disturb the update if this is the place."""
        if self.struck or place != self.state:
            return
        self.struck = True
        match self.disturbance:
            case "error":
                raise ERRORS[place]
            case "killed":
                raise PowerCut
            case "hangs":
                self.test_ends.wait(4 * SHORT_S if place == "received" else 20)
            case "disk full":
                self.disk.fault = "full"
            case "read-only":
                self.disk.fault = "read-only"
            case "memory short":
                raise MemoryError

    @property
    def reported(self) -> UpdateReport:
        return self.reports[-1]

    def prepare(self, package: Path, manifest: Manifest, interrupt: Interrupt) -> None:
        self.strike("preparing")

    def trial(self, package: Path, manifest: Manifest, interrupt: Interrupt) -> TrialMeasurement:
        self.strike("trying")
        return GOOD_TRIAL

    def activate(self, reference: PackageRef, interrupt: Interrupt) -> None:
        self.strike("activating")
        interrupt.check("activating")  # a service that notices too late must not switch
        self.serves = reference

    def report(self, report: UpdateReport) -> None:
        self.reports.append(report)
        if report.state is UpdateState.RECEIVED or (
            report.state is UpdateState.WAITING and self.disturbance == "killed"
        ):
            self.strike(report.state.value)

    def now(self) -> datetime:
        # Asked for twice: before the repository's dates are judged, and to see whether the window is open.
        inside = self.disturbance in {"disk full", "read-only", "memory short"}
        if inside and self.reports and self.reported.state is UpdateState.VERIFYING:
            self.strike("waiting")
        return NOON + timedelta(days=self.days)


class WatchedStore(Store):
    box: Box

    def verify(self, package: InstalledPackage, *, only: Collection[str] | None = None) -> None:
        if self.box.reports and self.box.reported.state is UpdateState.VERIFYING:
            self.box.strike("verifying")
        super().verify(package, only=only)


class WatchedSource(DirectorySource):
    def __init__(self, root: Path, box: Box) -> None:
        super().__init__(root)
        self._box = box

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str | None = None) -> Iterator[SourceStream]:
        self._box.strike("checking" if path == "metadata/timestamp.json" else "")
        self._box.strike("downloading" if path.startswith("blobs/") else "")
        with super().open(path, offset=offset, etag=etag) as stream:
            yield stream


def disturb(box: Box) -> str:
    """Run the update until the disturbance has had its effect; return what was reported."""
    wish = desired("2.0.0", id="two")
    try:
        box.updater().apply(wish)
        if box.state == "waiting" and not box.struck:
            if box.disturbance == "error":
                withdraw_package("tiny/2.0.0", box.world.repository())
            else:
                box.days = 15
            box.struck = True
            if box.disturbance == "error":
                box.window_opens.set()
            box.updater().apply(wish)
        if box.state == "active":
            return disturb_probation(box)
    except PowerCut:
        return f"{box.reported.state.value}, then nothing"
    return " ".join(filter(None, [box.reported.state.value, box.reported.reason]))


def disturb_probation(box: Box) -> str:
    """The new version is in use; now it fails as often as it may."""
    state_dir = box.world.path / "state"
    if box.disturbance == "killed":
        for _ in range(3):
            start = recovery.start_up(Store(state_dir, reserve_bytes=0), Ledger.open(state_dir))
            box.serves = None if start.package is None else start.package.reference
            if start.report is not None:
                box.reports.append(start.report)
    else:
        ledger = Ledger.open(state_dir)
        box.disk.fault = {"disk full": "full", "read-only": "read-only"}.get(box.disturbance)  # type: ignore[assignment]
        for _ in range(3):
            ledger.probation.note_failure(f"{box.disturbance}: the worker ended or was ended")
        box.updater(ledger).end_failed_probation()
    return " ".join(filter(None, [box.reported.state.value, box.reported.reason]))


def on_disk(box: Box) -> str:
    """Return the most of the new version that is on the disk."""
    store = box.world.store
    if NEW in store.installed():
        return "package"
    entries = load_manifest(box.world.path / "built" / "2.0.0").files
    weights = next(store.blobs.path(entry) for entry in entries if entry.role == "weights")
    return "blobs" if weights.exists() else "nothing"


def end(box: Box) -> str:
    """The disturbance is over: start anew, go on, and hear the wish again."""
    box.disk.fault = None
    box.window_opens.set()
    store = box.world.store
    start = recovery.start_up(store, Ledger.open(store.root))
    assert start.package is not None
    assert store.is_whole(start.package.reference)
    box.serves = start.package.reference
    updater = box.updater()
    updater.resume()
    report = updater.apply(desired("2.0.0", id="two")).report
    assert store.in_use() == box.serves
    assert report.active == str(box.serves)
    return " ".join(filter(None, [report.state.value, report.reason]))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory, keys: KeyDirectory) -> Path:
    """A device with version 1.0.0 in use, and a repository that has 2.0.0 as well."""
    folder = tmp_path_factory.mktemp("beginning")
    with make_world(folder, keys) as world:
        world.install("1.0.0")
        world.publish("2.0.0", weights_seed=2)
    return folder


@pytest.mark.parametrize(
    ("state", "disturbance"), [(state, what) for state in (*WORKING, "active") for what in DISTURBANCES]
)
def test_disturbed_update(
    tmp_path: Path,
    beginning: Path,
    keys: KeyDirectory,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    disturbance: str,
) -> None:
    expected = {(row.state, row.disturbance): row for row in read_table()}
    disk = BrokenDisk(monkeypatch)
    copy_state(beginning, tmp_path / "world")
    with PackageServer(tmp_path / "world" / "repository") as server:
        box = Box(World(tmp_path / "world", keys, server), disk, state, disturbance)
        reported = disturb(box)
        served = box.serves
        assert served is not None
        assert box.world.store.is_whole(served)
        left = on_disk(box)
        found = Row(state, disturbance, reported, served.version, left, end(box))
        box.test_ends.set()
    print(found)  # noqa: T201 (the table, for people)
    assert found == expected.get((state, disturbance))
