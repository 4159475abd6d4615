"""Updates: bytes of a changed blob, loss of a resume, speed of verifying, length of a switch, and random kills.

    scripts/bench update                       all of it, with 20 kills
    scripts/bench update --kills 200           also 200 kills at random times
    scripts/bench update --only kills --kills 200 --seed 7

transfer  Two versions that share all but one of their files, fetched over HTTP: the bytes that the server sent.
resume    A download is cut at 20 places, each time by another process; counted is what was fetched twice.
verify    Our verification of a file in the page cache against `sha256sum` on the same file, in turn; medians.
switch    A package is replaced in an agent's service while short requests follow one another without a pause, with real
          worker processes of the tests' small engine. The interruption is the longest time between two answers during
          the update beyond the median time between two answers.
kills     An updater process is killed with SIGKILL at a random time of an update over HTTP; then the next start must
          find a whole package and the update must come to its end. Bricked is every trial where it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import msgspec  # noqa: E402

from lamplighter_agent.config import RequestsConfig  # noqa: E402
from lamplighter_agent.engine.params import GenerationParams  # noqa: E402
from lamplighter_agent.errors import DownloadError  # noqa: E402
from lamplighter_agent.package.hashing import digest_file, verify_file  # noqa: E402
from lamplighter_agent.package.manifest import FileEntry  # noqa: E402
from lamplighter_agent.service.admission import RequestQueue  # noqa: E402
from lamplighter_agent.service.runner import PackageRunner  # noqa: E402
from lamplighter_agent.service.ticket import GenerationRequest  # noqa: E402
from lamplighter_agent.service.worker import WorkerSpec  # noqa: E402
from lamplighter_agent.service.worker_messages import Prompt  # noqa: E402
from lamplighter_agent.update.downloader import Downloader, DownloadOptions, HttpSource  # noqa: E402
from lamplighter_fleet.keys import KeyDirectory, create_keys  # noqa: E402
from support import crash_lab, fake_engine  # noqa: E402
from support.crash_lab import Trial, copy_state  # noqa: E402
from support.package_server import Fault, PackageServer  # noqa: E402
from support.packages import CHUNK_BYTES, WEIGHTS_BYTES, file_entry, write_package  # noqa: E402
from support.update_world import World, desired, make_world  # noqa: E402

MIB = 1024 * 1024
Figures = dict[str, Any]


def world_in(folder: Path) -> tuple[Path, KeyDirectory]:
    """Make keys and an empty directory for a world."""
    create_keys(folder / "keys")
    (folder / "world").mkdir()
    return folder / "world", KeyDirectory(folder / "keys")


def measure_transfer(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Count the bytes of an update that changes one blob."""
    place, keys = world_in(folder)
    with make_world(place, keys) as world:
        world.install("1.0.0", weights_seed=1)
        package = world.publish("2.0.0", weights_seed=2)
        world.server.exchanges.clear()
        assert world.updater().apply(desired("2.0.0", id="two")).succeeded
        sent, metadata = world.server.body_bytes("/blobs/"), world.server.body_bytes("/metadata/")
    return {
        "package_bytes": package.new_bytes + package.reused_bytes,
        "changed_blob_bytes": WEIGHTS_BYTES,
        "blob_bytes_sent": sent,
        "metadata_bytes_sent": metadata,
        "met": sent == WEIGHTS_BYTES,
    }


def measure_resume(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Cut a download at many places and count what was fetched twice."""
    directory = folder / "served"
    directory.mkdir()
    length = 200 * CHUNK_BYTES + 77
    (directory / "blob").write_bytes(random.Random(arguments.seed).randbytes(length))
    entry = msgspec.convert(file_entry(directory / "blob", "weights"), FileEntry)
    chance = random.Random(arguments.seed)
    losses = []
    with PackageServer(directory) as server:
        for trial in range(20):
            target = folder / f"arrived-{trial}"
            server.exchanges.clear()
            server.faults = [
                Fault("blob", times=1, cut_after=chance.randrange(1, length)),
                Fault("blob", times=1, status=403),
            ]
            options = DownloadOptions(retries=0, backoff_s=0.0)
            for _ in range(3):  # each is a new process as far as the downloader can tell: it knows only the file
                try:
                    Downloader(HttpSource(server.url), options).fetch_file("blob", entry, target)
                except DownloadError:
                    continue
                break
            assert target.read_bytes() == (directory / "blob").read_bytes()
            losses.append(server.body_bytes("blob") - length)
    return {
        "chunk_bytes": CHUNK_BYTES,
        "cuts": len(losses),
        "most_fetched_twice_bytes": max(losses),
        "met": max(losses) < CHUNK_BYTES,
    }


def measure_verify(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Compare our verification with sha256sum, in turn."""
    path = folder / "weights"
    block = random.Random(1).randbytes(16 * MIB)
    with path.open("wb") as stream:
        for _ in range(arguments.verify_mb // 16):
            stream.write(block)
    digest = digest_file(path, MIB)
    entry = msgspec.convert(
        {"name": "weights", "role": "weights", "length": digest.length, "sha256": digest.sha256}, FileEntry
    )
    ours, theirs = [], []
    for _ in range(arguments.runs):
        begun = time.perf_counter()
        verify_file(path, entry)
        ours.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        subprocess.run(["sha256sum", str(path)], check=True, stdout=subprocess.DEVNULL)
        theirs.append(time.perf_counter() - begun)
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {
        "bytes": digest.length,
        "ours_mb_per_s": digest.length / MIB / statistics.median(ours),
        "sha256sum_mb_per_s": digest.length / MIB / statistics.median(theirs),
        "share_of_sha256sum": ratio,
        "met": ratio >= 0.8,
    }


def measure_switch(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Measure how long no answer comes while packages are tried and switched."""
    for version in ("1.0.0", "2.0.0"):
        write_package(folder / version, version=version)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    gaps, usual, failed = asyncio.run(_switch(folder, arguments.switches))
    return {
        "switches": len(gaps),
        "median_time_between_answers_s": usual,
        "median_interruption_s": statistics.median(gaps),
        "longest_interruption_s": max(gaps),
        "failed_requests": failed,
        "met": max(gaps) < 0.2 and not failed,
    }


async def _switch(folder: Path, switches: int) -> tuple[list[float], float, int]:
    requests = RequestQueue(RequestsConfig(queue_size=8))
    runner = PackageRunner(WorkerSpec(package=Path(), engine=fake_engine.ENTRY), requests, lambda: None)
    await runner.switch(folder / "1.0.0")
    times: list[float] = []
    failed = 0
    stop = asyncio.Event()

    async def ask_for_ever() -> None:
        nonlocal failed
        number = 0
        while not stop.is_set():
            number += 1
            request = GenerationRequest(
                id=str(number), sender=f"bench/{number}", prompt=Prompt(text="hi"), model=None,
                params=GenerationParams(max_tokens=4), deadline_s=30.0, idempotent=False,
            )  # fmt: skip
            ticket = requests.submit(request)
            assert ticket is not None
            try:
                async for _ in ticket:
                    pass
                times.append(time.perf_counter())
            except Exception:  # counted: no request may be lost
                failed += 1

    asking = asyncio.create_task(ask_for_ever())
    gaps: list[float] = []
    await asyncio.sleep(1.0)
    usual = statistics.median(after - before for before, after in pairwise(times))
    for number in range(switches):
        package = folder / ("2.0.0" if number % 2 == 0 else "1.0.0")
        begun = len(times)
        await runner.switch(package)
        await asyncio.sleep(0.2)
        span = times[max(begun - 1, 0) :]
        gaps.append(max(after - before for before, after in pairwise(span)) - usual)
    stop.set()
    await asking
    await runner.stop(0.0)
    return gaps, usual, failed


def measure_kills(folder: Path, arguments: argparse.Namespace) -> Figures:
    """Kill updates at random times and look at what the next start makes of it."""
    place, keys = world_in(folder)
    chance = random.Random(arguments.seed)
    with make_world(place, keys) as world:
        world.install("1.0.0", weights_seed=1)
        world.publish("2.0.0", weights_seed=2)
        copy_state(place / "state", folder / "beginning")
        (place / "root.json").write_bytes(keys.root())
        whole_s = _time_of_update(world, folder)
        bricked: list[str] = []
        cut: dict[str, int] = {}
        for number in range(arguments.kills):
            shutil.rmtree(place / "state")
            copy_state(folder / "beginning", place / "state")
            trial = Trial(folder=str(place), operation="install", url=world.server.url)
            _kill_after(chance.uniform(0.0, whole_s * 1.05), lambda trial=trial: crash_lab.operate(trial))
            state = _journal_state(place / "state")
            cut[state] = cut.get(state, 0) + 1
            result = crash_lab.restart(trial)
            if result.error or not result.whole or result.ended != "tiny/2.0.0" or result.state != "active":
                bricked.append(f"{number}: {result}")
    for line in bricked:
        print(line, file=sys.stderr)
    return {
        "kills": arguments.kills,
        "seed": arguments.seed,
        "update_s": whole_s,
        "killed_in": cut,
        "bricked": len(bricked),
        "met": not bricked,
    }


def _time_of_update(world: World, folder: Path) -> float:
    place = Path(world.path)
    begun = time.perf_counter()
    crash_lab.operate(Trial(folder=str(place), operation="install", url=world.server.url))
    return time.perf_counter() - begun


def _kill_after(seconds: float, work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _journal_state(state: Path) -> str:
    try:
        record = json.loads((state / "update.json").read_bytes())["record"]
    except (OSError, ValueError, KeyError):
        return "before"
    return str(record["report"]["state"]) if record and record["desired"]["version"] == "2.0.0" else "before"


SUBJECTS = {
    "transfer": measure_transfer,
    "resume": measure_resume,
    "verify": measure_verify,
    "switch": measure_switch,
    "kills": measure_kills,
}


def main() -> int:
    """Measure and print; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=tuple(SUBJECTS), help="measure this alone; several times")
    parser.add_argument("--kills", type=int, default=20, help="trials (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (default: 1)")
    parser.add_argument("--runs", type=int, default=7, help="verifications (default: 7)")
    parser.add_argument("--verify-mb", type=int, default=256, help="size of the verified file (default: 256)")
    parser.add_argument("--switches", type=int, default=10, help="switches (default: 10)")
    parser.add_argument("--json", action="store_true", help="print for a machine")
    arguments = parser.parse_args()
    figures: Figures = {
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "load_1m": os.getloadavg()[0]}
    }
    for name in arguments.only or SUBJECTS:
        with tempfile.TemporaryDirectory(prefix="lamplighter-bench-") as folder:
            figures[name] = SUBJECTS[name](Path(folder), arguments)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, values in figures.items():
            print(name)
            for key, value in values.items():
                print(f"  {key:32} {f'{value:.4g}' if isinstance(value, float) else value}")
    return 0 if all(values.get("met", True) for values in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
