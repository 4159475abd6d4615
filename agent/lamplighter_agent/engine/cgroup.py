"""What control groups allow this process: memory and cores, v2 and v1, every level up to the root."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

_V1_UNLIMITED: Final = 2**60


class MemoryLevel(NamedTuple):
    """A limited level.

    Attributes:
        limit_bytes: Its limit.
        used_bytes: In use there and not to be reclaimed at once.
        events: How often the limit was met.
    """

    limit_bytes: int
    used_bytes: int
    events: int = 0

    @property
    def free_bytes(self) -> int:
        """What may still be used."""
        return max(self.limit_bytes - self.used_bytes, 0)


def memory_levels(root: Path) -> list[MemoryLevel]:
    """Return every limited level of this process's memory groups, the innermost first."""
    levels = []
    for controllers, path in _paths(root):
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for directory in _directories(base, path):
            limit, used = read_count(directory / names[0]), read_count(directory / names[1])
            if limit is not None and limit < _V1_UNLIMITED and used is not None:
                used = max(used - read_stat(directory / "memory.stat", names[2]), 0)
                levels.append(MemoryLevel(limit, used, _events(directory)))
    return levels


def pressure_files(root: Path) -> list[Path]:
    """Return the pressure files of this process's v2 groups and of the machine; they may be missing."""
    groups = [path for controllers, path in _paths(root) if controllers == ""]
    base = root / "sys/fs/cgroup"
    files = [directory / "memory.pressure" for path in groups for directory in _directories(base, path)]
    return [*files, root / "proc/pressure/memory"]


def _events(directory: Path) -> int:
    events = directory / "memory.events"
    return read_stat(events, "max") + read_stat(events, "high") + (read_count(directory / "memory.failcnt") or 0)


def _paths(root: Path) -> list[tuple[str, str]]:
    """Return (controllers, path) of each line of ``/proc/self/cgroup``; controllers is empty for v2."""
    lines = read_text(root / "proc/self/cgroup").splitlines()
    fields = [line.split(":", 2) for line in lines]
    return [(field[1], field[2]) for field in fields if len(field) == 3]


def _directories(base: Path, path: str) -> list[Path]:
    """Return the existing directories from a cgroup up to its mount point.

    Inside a container the path may be the host's, of which only the mount point exists.
    """
    parts = [part for part in path.split("/") if part not in ("", "..")]
    candidates = [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return [directory for directory in candidates if directory.is_dir()]


def quota_cores(root: Path) -> int | None:
    """Return the whole cores that the tightest CPU quota allows, at least 1; None without a quota."""
    quotas = []
    for controllers, path in _paths(root):
        if controllers == "":
            for directory in _directories(root / "sys/fs/cgroup", path):
                fields = read_text(directory / "cpu.max").split()
                if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():
                    quotas.append(int(fields[0]) / int(fields[1]))
        elif "cpu" in controllers.split(","):
            for directory in _directories(root / "sys/fs/cgroup/cpu", path):
                quota, period = (read_count(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                if quota is not None and period:
                    quotas.append(quota / period)
    return max(1, int(min(quotas))) if quotas else None


def read_text(path: Path) -> str:
    """Return a file's text; empty where the kernel, or a container, does not offer it."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def read_count(path: Path) -> int | None:
    """Return the number in a file; None for ``max``, ``-1`` or a file that is not there."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_stat(path: Path, key: str) -> int:
    """Return the number behind a word in a file of lines ``word number``; 0 if it is not there."""
    for line in read_text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0
