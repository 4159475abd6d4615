"""Real memory limits for tests: a control group of version 1 or 2, where this machine lets one be made."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A group with a limit.

    Attributes:
        directory: Its directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(self, pid: int) -> None:
        """Move a process into the group."""
        (self.directory / "cgroup.procs").write_text(str(pid), encoding="ascii")

    @property
    def kills(self) -> int:
        """How many processes the kernel ended for the limit."""
        for name in ("memory.oom_control", "memory.events"):
            path = self.directory / name
            for line in path.read_text(encoding="ascii").splitlines() if path.exists() else ():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group with a limit for the block, or skip the test."""
    base, limit, swap = (
        (_V1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if (_V1 / "memory.limit_in_bytes").exists()
        else (_V2, "memory.max", "memory.swap.max")
    )
    directory = base / f"lamplighter-test-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir()
        (directory / limit).write_text(str(limit_bytes), encoding="ascii")
    except OSError as error:
        if directory.is_dir():
            directory.rmdir()
        pytest.skip(f"no memory control group can be made here: {error}")
    if (directory / swap).exists():
        (directory / swap).write_text(str(limit_bytes if base == _V1 else 0), encoding="ascii")
    try:
        yield MemoryGroup(directory)
    finally:
        for pid in (directory / "cgroup.procs").read_text(encoding="ascii").split():
            (base / "cgroup.procs").write_text(pid, encoding="ascii")
        directory.rmdir()
