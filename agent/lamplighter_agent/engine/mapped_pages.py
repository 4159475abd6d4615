"""Gives pages of a mapped file back that were needed once.

To find the packed weights of a prepared copy, onnxruntime reads all scales and zero points as it loads, and never
again: 15 of 120 MiB with SmolLM2-135M. They would stay resident for life.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path
from typing import Final

_ENTRY_BYTES: Final = 8
_PRESENT: Final = 1 << 7
_SWAPPED: Final = 1 << 6
_OF_FILE: Final = 1 << 5
"""Bits of the last byte of an entry of ``/proc/PID/pagemap`` (Linux, ``Documentation/admin-guide/mm/pagemap.rst``)."""

_MADV_DONTNEED: Final = 4
"""From ``<sys/mman.h>``; the ``mmap`` module has it for its own mappings only."""


def release_pages(path: Path) -> int:
    """Unmap the resident pages of a file in this process; they come back when they are read again.

    A mapping in which a page was written to is left alone: what was written is nowhere else.

    Args:
        path: A file that was mapped privately, by whomever.

    Returns:
        Bytes of the mappings that were let go of; 0 where the system cannot.
    """
    try:
        maps = Path("/proc/self/maps").read_bytes()
        advise = ctypes.CDLL(None).madvise
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            ranges = [span for span in _mappings(maps, path.resolve()) if _unwritten(pagemap.fileno(), *span)]
    except (AttributeError, OSError):
        return 0  # not Linux
    return sum(
        end - begin
        for begin, end in ranges
        if advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED) == 0
    )


def _mappings(maps: bytes, path: Path) -> list[tuple[int, int]]:
    """Return begin and end of each mapping of a file."""
    line = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .* " + re.escape(os.fsencode(path)) + rb"$", re.MULTILINE)
    return [(int(found[1], 16), int(found[2], 16)) for found in line.finditer(maps)]


def _unwritten(pagemap: int, begin: int, end: int) -> bool:
    first, count = begin // mmap.PAGESIZE, (end - begin) // mmap.PAGESIZE
    entries = os.pread(pagemap, count * _ENTRY_BYTES, first * _ENTRY_BYTES)
    flags = set(entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES])
    written = any(flag & (_PRESENT | _OF_FILE) == _PRESENT or flag & _SWAPPED for flag in flags)
    return len(entries) == count * _ENTRY_BYTES and not written
