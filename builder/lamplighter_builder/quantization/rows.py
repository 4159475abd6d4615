"""Work on the rows of a large matrix in pieces that fit a core's cache, on all cores.

numpy's element-wise functions use one core and stream whole arrays through memory, once for each function; a piece that
stays in the cache is several times as fast, and numpy lets go of the interpreter meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

_PIECE_BYTES: Final = 256 * 1024


def in_row_ranges(rows: int, row_bytes: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` for consecutive ranges of rows that together are all of them, several at a time.

    Args:
        rows: Number of rows.
        row_bytes: Bytes of one row of the input.
        work: Is given each range; writes only to its own rows.
    """
    step = max(1, _PIECE_BYTES // max(row_bytes, 1))
    ranges = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(ranges) < 2:
        for part in ranges:
            work(part)
        return
    for _ in _pool().map(work, ranges):
        pass


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="rows")
