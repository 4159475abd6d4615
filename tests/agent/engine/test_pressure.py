from __future__ import annotations

from pathlib import Path

import pytest

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import CacheArray
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.engine.pressure import MIB, MemoryGuard, Readings, judge, read_pressure
from lamplighter_agent.errors import RequestError
from support.file_tree import write_files

GIB = 1024 * MIB
CALM = Readings(free=((4 * GIB, 2 * GIB), (512 * MIB, 100 * MIB)), events=7)
SHORT = Readings(free=((512 * MIB, 20 * MIB),), events=7)
CRITICAL = Readings(free=((512 * MIB, 4 * MIB),), events=7)


@pytest.mark.parametrize(
    ("now", "level"),
    [
        (CALM, "none"),
        (Readings(), "none"),
        (SHORT, "short"),
        (CRITICAL, "critical"),
        (Readings(free=((64 * GIB, 400 * MIB),)), "none"),
        (Readings(free=((64 * GIB, 200 * MIB),)), "short"),
        (Readings(free=((64 * GIB, 50 * MIB),)), "critical"),
        (Readings(some_percent=12.0), "short"),
        (Readings(some_percent=60.0, full_percent=15.0), "critical"),
        (Readings(free=((512 * MIB, 30 * MIB),), events=8), "short"),
        (Readings(free=((512 * MIB, 200 * MIB),), events=8), "none"),
    ],
)
def test_how_bad_it_is(now: Readings, level: str) -> None:
    assert judge(now, CALM) == level


def test_everything_the_kernel_offers_is_read_in_v2(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  300 kB\n",
            "proc/self/cgroup": "0::/box\n",
            "proc/pressure/memory": "some avg10=3.50 avg60=1.00\nfull avg10=0.25 avg60=0.00\n",
            "sys/fs/cgroup/box/memory.max": "500000\n",
            "sys/fs/cgroup/box/memory.current": "450000\n",
            "sys/fs/cgroup/box/memory.stat": "inactive_file 50000\n",
            "sys/fs/cgroup/box/memory.events": "low 0\nhigh 2\nmax 5\noom 1\noom_kill 1\n",
            "sys/fs/cgroup/box/memory.pressure": "some avg10=1.00 avg60=1.00\nfull avg10=0.75 avg60=0.00\n",
        },
    )
    assert read_pressure(root) == Readings(
        free=((1024000, 307200), (500000, 100000)), events=7, some_percent=3.5, full_percent=0.75
    )


def test_v1_and_a_kernel_without_pressure_files_are_read(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/jobs\n",
            "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "500000\n",
            "sys/fs/cgroup/memory/jobs/memory.usage_in_bytes": "100000\n",
            "sys/fs/cgroup/memory/jobs/memory.failcnt": "3\n",
        },
    )
    assert read_pressure(root) == Readings(free=((500000, 400000),), events=3)


class World:
    """A guard whose readings and clock the test moves."""

    def __init__(self) -> None:
        self.now, self.readings, self.reads = 0.0, CALM, 0
        self.prefixes = PrefixCache(CacheSpec(1, 1, 4), max_bytes=1 << 20)
        self.guard = MemoryGuard(self.prefixes, read=self._read, clock=lambda: self.now)

    def _read(self) -> Readings:
        self.reads += 1
        return self.readings

    def fill(self) -> None:
        def rows(block: CacheArray, _begin: int) -> None:
            block[:] = 1

        self.prefixes.store_filled([1, 2, 3], rows)

    def after(self, seconds: float, readings: Readings) -> None:
        self.now += seconds
        self.readings = readings
        self.guard.tend()


def test_the_prefix_cache_goes_first_and_requests_are_still_taken() -> None:
    world = World()
    world.fill()
    world.after(2.0, SHORT)
    assert (world.guard.level, world.prefixes.nbytes) == ("short", 0)
    world.fill()
    assert world.prefixes.nbytes == 0
    world.guard.admit()


def test_new_requests_are_refused_with_a_hint_when_it_is_critical() -> None:
    world = World()
    world.after(2.0, CRITICAL)
    with pytest.raises(RequestError, match="memory is critically short") as caught:
        world.guard.admit()
    assert (caught.value.code, caught.value.retry_after_s) == (503, 5.0)
    world.after(2.0, CALM)
    world.guard.admit()


def test_the_prefix_cache_comes_back_when_it_has_been_calm_for_a_while() -> None:
    world = World()
    world.after(2.0, SHORT)
    world.after(10.0, CALM)
    world.fill()
    assert world.prefixes.nbytes == 0
    world.after(20.0, CALM)
    world.fill()
    assert world.prefixes.nbytes == 3 * world.prefixes.spec.bytes_per_token


def test_looks_are_a_second_apart() -> None:
    world = World()
    for _ in range(100):
        world.after(0.1, CALM)
    assert world.reads <= 11


def test_this_machine_can_be_read() -> None:
    readings = read_pressure()
    assert readings.free
    assert all(total >= free >= 0 for total, free in readings.free)
