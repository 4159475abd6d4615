"""The C library's heap: what was freed goes back to the system, so that it does not stay resident for life."""

from __future__ import annotations

import ctypes
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
"""``mallopt``'s parameter, from glibc's malloc.h."""

_MAPPED_FROM_BYTES: Final = 256 * 1024


def trim_heap() -> bool:
    """Give freed memory back, 14 MiB after a tokenizer of 49,152 tokens; return False where the C library cannot."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False  # not glibc
    return bool(trim(0))


def map_large_blocks() -> bool:
    """Take blocks of 256 KiB and more from the system one by one, in this process, from now on; False if it cannot.

    glibc raises that bound by itself once such a block was freed. Blocks that grow with a text then come from the heap
    and leave holes that nothing fits into: 30 to 130 MiB, where prompts on an int8 cache are unpacked.
    """
    try:
        choose = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # not glibc
    return bool(choose(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES))
