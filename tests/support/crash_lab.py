"""Kills an updater at a chosen step of its work and starts another on what is left.

``python -m support.crash_lab`` reads one JSON object a line and answers each with one: a process that has imported
everything once and forks for each trial, so that hundreds of trials take seconds. `CrashLab` is its other end.

A step is a call of the operating system that changes names or makes something durable: fsync, rename, unlink, mkdir,
rmdir, symlink, link. The process ends by SIGKILL just before it. An fsync itself does nothing here: a killed process
loses nothing that it has written, and what a power cut takes is for `StrictDisk` to say.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from lamplighter_agent.errors import LamplighterError
from lamplighter_agent.update import recovery
from lamplighter_agent.update.compatibility import DeviceFacts
from lamplighter_agent.update.downloader import DownloadOptions, HttpSource
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.sources import DirectorySource, Source
from lamplighter_agent.update.states import Desired
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement
from lamplighter_agent.update.updater import Updater
from support.strict_disk import Loss, StrictDisk

Operation = Literal["install", "rollback", "prune"]
STEPS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "symlink", "link")
NEVER = 1_000_000


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial.

    Attributes:
        folder: Holds ``state/``, ``repository/`` and ``root.json``.
        operation: What is done when the process is killed.
        at: The step before which it is killed, counted from 0.
        loss: What the disk forgets.
        url: Where the repository is served; empty: ``folder/repository`` is read.
    """

    folder: str
    operation: Operation
    at: int = NEVER
    loss: Loss = "nothing"
    url: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        steps: Steps done before the end.
        killed_at: Name of the step and the file, or empty if the operation came to its end.
        started: ``name/version`` that the next start runs, or None.
        whole: True if every file of it is as its manifest says.
        ended: ``name/version`` in use once the operation was taken up again and ended, or None.
        state: How the update ended then; empty for an operation without one.
        rubbish: Paths in the store that belong to nothing.
        error: Traceback of a defect, or empty.
    """

    steps: int = 0
    killed_at: str = ""
    started: str | None = None
    whole: bool = False
    ended: str | None = None
    state: str = ""
    rubbish: tuple[str, ...] = ()
    error: str = ""


class CrashLab:
    """The process that carries trials out."""

    def __init__(self) -> None:
        tests = str(Path(__file__).parents[1])
        path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.crash_lab"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(self, trial: Trial) -> Result:
        """Carry one trial out; ``state/`` is changed by it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(trial) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Result)

    def close(self) -> None:
        self._process.communicate(timeout=10)

    def __enter__(self) -> CrashLab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def copy_state(source: Path, destination: Path) -> None:
    """Copy a state directory with its hard links."""
    disk = StrictDisk(source)
    disk.rebuild(destination, "nothing")
    disk.close()


def make_updater(folder: Path, url: str = "") -> Updater:
    """Return an updater on the state of a trial; what it asks of the service succeeds at once."""
    measurement = TrialMeasurement(self_test_tokens=((3, 4, 5),), load_s=0.1, generated_tokens_per_s=50.0)
    source: Source = HttpSource(url) if url else DirectorySource(folder / "repository")
    return Updater(
        Store(folder / "state", reserve_bytes=0),
        source,
        root=(folder / "root.json").read_bytes(),
        device=DeviceFacts(agent_version="0.1.0", onnxruntime_version="1.31.1", memory_bytes=10**9),
        hooks=UpdateHooks(
            prepare=lambda package, manifest, _: None,
            trial=lambda package, manifest, _: measurement,
            activate=lambda reference, _: None,
            report=lambda report: None,
        ),
        options=UpdateOptions(download=DownloadOptions(retries=2, backoff_s=0.05), parallel_downloads=1),
    )


WISH = Desired(package="tiny", version="2.0.0", id="two", requested_by="lab")


def operate(trial: Trial) -> str:
    """Do what a trial is about; return how the update ended, if it is one."""
    folder = Path(trial.folder)
    if trial.operation == "prune":
        store = Store(folder / "state", reserve_bytes=0)
        with store.lock():
            store.prune()
        return ""
    updater = make_updater(folder, trial.url)
    if trial.operation == "rollback":
        if Store(folder / "state", reserve_bytes=0).previous() is not None:
            updater.rollback(requested_by="lab")
        return ""
    return updater.apply(WISH).report.state.value


class _Trap:
    """Counts the steps of this process and ends it before one of them."""

    def __init__(self, trial: Trial, note: Callable[[int, str], None]) -> None:
        self._trial = trial
        self._note = note
        self._state = Path(trial.folder, "state")
        self._disk = StrictDisk(self._state) if trial.loss != "nothing" else None
        self._lock = threading.Lock()
        self._count = 0

    def set(self) -> None:
        for name in STEPS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    @property
    def count(self) -> int:
        return self._count

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 (any call of the operating system)
            with self._lock:
                if self._count == self._trial.at:
                    self._spring(f"{name} {arguments[0]}")
                self._count += 1
                result = call(*arguments, **options)
                if name == "fsync" and self._disk is not None:
                    self._disk.sync(arguments[0])
                return result

        return step

    def _spring(self, where: str) -> None:
        self._note(self._count, where)
        if self._disk is not None:
            for name, call in _REAL.items():  # the tree is built with calls that are not counted
                setattr(os, name, call)
            self._disk.rebuild(self._state.with_name("left"), self._trial.loss)
        os.kill(os.getpid(), signal.SIGKILL)


_REAL = {name: getattr(os, name) for name in STEPS if name != "fsync"}


def _crash(trial: Trial, notes: int) -> None:
    """Run the operation until it is killed; in a process of its own."""

    def note(count: int, where: str) -> None:
        os.write(notes, json.dumps([count, where]).encode())

    trap = _Trap(trial, note)
    trap.set()
    operate(trial)
    note(trap.count, "")


def _restart(trial: Trial, answer: int) -> None:
    """Start anew on what is left and bring the operation to its end; in a process of its own."""
    folder = Path(trial.folder)
    store = Store(folder / "state", reserve_bytes=0)
    ledger = Ledger.open(store.root)
    package = recovery.start_up(store, ledger).package
    started = package.reference if package is not None else None
    whole = started is not None and store.is_whole(started)
    state = ""
    updater = make_updater(folder, trial.url)
    for _ in range(3):  # what was cut off goes on; then the retained wish comes from the broker
        outcome = updater.resume()
        if outcome is None:
            break
        state = outcome.report.state.value
    state = operate(trial) or state
    current = store.current()
    result = Result(
        started=str(started) if started else None,
        whole=whole,
        ended=str(current.reference) if current else None,
        state=state,
        rubbish=_rubbish(store),
    )
    os.write(answer, msgspec.json.encode(result))


def _rubbish(store: Store) -> tuple[str, ...]:
    """Return what lies in the store and belongs to nothing, once all is over and pruned."""
    with store.lock():
        store.prune(store.newest(1))
    wanted = {"metadata", "blobs", "packages", "prepared", "staging", "current", "previous", ".lock"}
    wanted |= {"update.json", "probation.json", "audit.jsonl"}
    wanted |= {".update.json.tmp", ".probation.json.tmp"}  # the next write makes them anew
    found = [path.name for path in store.root.iterdir() if path.name not in wanted]
    found += [str(path) for path in store.staging_dir.iterdir() if path.name != "metadata"]
    digests = {entry.sha256 for reference in store.installed() for entry in store.package(reference).manifest.files}
    found += [path.name for path in store.blobs.directory.iterdir() if path.name not in digests]
    for reference in store.installed():
        package = store.package(reference)
        listed = {"manifest.json", *(entry.name for entry in package.manifest.files)}
        found += [str(path) for path in package.path.iterdir() if path.name not in listed]
    return tuple(found)


@contextmanager
def _forked(work: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run ``work`` in a child that may write one answer; give its process id and the end to read from."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            work(writer)
        except BaseException:
            os.write(writer, b"!" + traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        yield child, reader
    finally:
        os.close(reader)


def _run_child(work: Callable[[int], None]) -> bytes:
    with _forked(work) as (child, reader):
        answer = b""
        while block := os.read(reader, 65536):
            answer += block
        os.waitpid(child, 0)
    return answer


def run_trial(trial: Trial) -> Result:
    """Carry one trial out in children of this process."""
    first = _run_child(lambda notes: _crash(trial, notes))
    if first.startswith(b"!") or not first:
        return Result(error=first.decode() or "the child died without a word")
    steps, where = json.loads(first)
    result = restart(trial)
    return msgspec.structs.replace(result, steps=steps, killed_at=where)


def restart(trial: Trial) -> Result:
    """Start anew on what a killed process has left, in a child of this process."""
    state, left = Path(trial.folder, "state"), Path(trial.folder, "left")
    if left.exists():
        shutil.rmtree(state)
        left.rename(state)
    answer = _run_child(lambda answer: _restart(trial, answer))
    if answer.startswith(b"!") or not answer:
        return Result(error=answer.decode() or "the next start died")
    return msgspec.json.decode(answer, type=Result)


def main() -> None:
    os.fsync = os.fstat  # type: ignore[assignment]
    for line in sys.stdin.buffer:
        try:
            result = run_trial(msgspec.json.decode(line, type=Trial))
        except (LamplighterError, OSError):
            result = Result(error=traceback.format_exc())
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
