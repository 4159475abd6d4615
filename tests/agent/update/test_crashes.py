"""The crash harness: an updater killed before every step of its work, on a disk that forgets more or less.

After each of them the next start must have a whole package to run, and the operation must come to its end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamplighter_agent.update.states import PackageRef
from lamplighter_fleet.keys import KeyDirectory
from support.crash_lab import NEVER, CrashLab, Operation, Result, Trial, copy_state
from support.strict_disk import Loss, StrictDisk
from support.update_world import desired, make_world

ENDS = {"install": "tiny/2.0.0", "rollback": "tiny/1.0.0", "prune": "tiny/2.0.0"}
STARTS = {
    "install": {"tiny/1.0.0", "tiny/2.0.0"},
    "rollback": {"tiny/1.0.0", "tiny/2.0.0"},
    "prune": {"tiny/2.0.0"},
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, keys: KeyDirectory) -> dict[str, Path]:
    """State directories from which the operations begin."""
    folder = tmp_path_factory.mktemp("crash-templates")
    with make_world(folder, keys) as world:
        world.install("1.0.0", weights_seed=1)
        world.publish("2.0.0", weights_seed=2)
        copy_state(folder / "state", folder / "install")
        world.updater().apply(desired("2.0.0", id="two"))
        copy_state(folder / "state", folder / "rollback")
        # For pruning: a package that is neither in use nor the one before, an unfinished download, a prepared copy.
        world.publish("3.0.0", weights_seed=3)
        world.updater().pull(PackageRef("tiny", "3.0.0"))
        prepared = folder / "state" / "prepared" / "tiny-3.0.0-cpu-ort"
        prepared.mkdir(parents=True)
        (prepared / "weights.bin").write_bytes(b"x" * 100)
        (folder / "state" / "blobs" / f"{'0' * 64}.part").write_bytes(b"half")
        copy_state(folder / "state", folder / "prune")
    return {name: folder / name for name in ENDS} | {"repository": folder / "repository"}


@pytest.fixture(scope="module")
def lab() -> Iterator[CrashLab]:
    with CrashLab() as made:
        yield made


class Bench:
    """Runs trials, each on a fresh copy of the operation's beginning."""

    def __init__(self, lab: CrashLab, templates: dict[str, Path], folder: Path, root: bytes) -> None:
        self._lab, self._templates, self._folder = lab, templates, folder
        (folder / "repository").symlink_to(templates["repository"])
        (folder / "root.json").write_bytes(root)

    def run(self, operation: Operation, *, at: int = NEVER, loss: Loss = "nothing") -> Result:
        shutil.rmtree(self._folder / "state", ignore_errors=True)
        copy_state(self._templates[operation], self._folder / "state")
        return self._lab.run(Trial(folder=str(self._folder), operation=operation, at=at, loss=loss))


@pytest.fixture
def bench(lab: CrashLab, templates: dict[str, Path], tmp_path: Path, keys: KeyDirectory) -> Bench:
    return Bench(lab, templates, tmp_path, keys.root())


OPERATIONS: tuple[Operation, ...] = ("install", "rollback", "prune")
LOSSES: tuple[Loss, ...] = ("nothing", "data", "everything")


def is_good(operation: Operation, result: Result) -> bool:
    """The next start had a whole package to run, the operation ended, and nothing lies about."""
    started = result.started in STARTS[operation] and result.whole
    ended = result.ended == ENDS[operation] and result.state in {"active", ""}
    return bool(result.killed_at) and started and ended and not result.rubbish


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_before_each_step_in_turn_it_starts_again_and_ends(bench: Bench, operation: Operation) -> None:
    """The disk forgets nothing, data, or everything that was not fsynced, step by step in turn."""
    steps = bench.run(operation).steps
    results = [bench.run(operation, at=at, loss=LOSSES[at % 3]) for at in range(steps)]
    assert steps >= 14
    assert [result for result in results if not is_good(operation, result)] == []


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_before_each_step_with_each_loss_it_starts_again_and_ends(
    bench: Bench, operation: Operation, loss: Loss
) -> None:
    steps = bench.run(operation).steps
    results = [bench.run(operation, at=at, loss=loss) for at in range(steps)]
    assert [result for result in results if not is_good(operation, result)] == []


def test_strict_disk_keeps_what_was_made_durable_and_nothing_else(tmp_path: Path) -> None:
    """The harness is no harness if its disk cannot forget."""
    live = tmp_path / "live"
    live.mkdir()
    (live / "old").write_bytes(b"old")
    disk = StrictDisk(live)
    for name in ("synced", "nameless", "empty"):
        with (live / name).open("wb") as stream:
            stream.write(b"data")
            stream.flush()
            if name != "empty":
                disk.sync(stream.fileno())
        if name == "synced":
            sync_directory(disk, live)
    (live / "old").rename(live / "new")
    left = {}
    for loss in LOSSES:
        disk.rebuild(tmp_path / loss, loss)
        left[loss] = {path.name: path.read_bytes() for path in (tmp_path / loss).iterdir()}
    disk.close()
    data = {"synced": b"data", "nameless": b"data", "new": b"old"}
    assert left["nothing"] == {**data, "empty": b"data"}
    assert left["data"] == {**data, "empty": b""}
    assert left["everything"] == {"synced": b"data", "old": b"old"}


def sync_directory(disk: StrictDisk, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    disk.sync(descriptor)
    os.close(descriptor)
