"""Mapped files whose pages are given back: on real mappings."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest

from lamplighter_agent.engine.mapped_pages import release_pages

PAGES = 16
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights (1)+.data"
    path.write_bytes(bytes(range(256)) * (PAGES * mmap.PAGESIZE // 256))
    return path


def mapped(path: Path) -> mmap.mmap:
    """A private mapping, all of whose pages were read."""
    with path.open("rb") as opened:
        region = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    assert sum(region[place] for place in range(0, len(region), mmap.PAGESIZE)) == 0
    return region


def resident_bytes(path: Path) -> int:
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return sum(int(found) * 1024 for found in re.findall(re.escape(str(path)) + r"\n(?:\w+: .*\n)*?Rss: +(\d+)", smaps))


def test_pages_that_were_read_are_given_back_and_come_again(file: Path) -> None:
    region = mapped(file)
    assert resident_bytes(file) == len(region)
    assert release_pages(file) == len(region)
    assert resident_bytes(file) == 0
    assert region[:] == file.read_bytes()


def test_a_mapping_that_was_written_to_is_kept(file: Path) -> None:
    region = mapped(file)
    region[5 * mmap.PAGESIZE] = 99
    assert release_pages(file) == 0
    assert region[5 * mmap.PAGESIZE] == 99


def test_other_files_are_left_alone(file: Path) -> None:
    other = file.with_name("x" + file.name)
    other.write_bytes(file.read_bytes())
    region = mapped(other)
    assert release_pages(file) == 0
    assert resident_bytes(other) == len(region)
