"""Memory whose pages can be mapped at several addresses, so that rows of a tensor can be one and the same memory.

The kernel maps a file without a name (``memfd_create``) as often as it is asked to. Python's ``mmap`` cannot choose an
address, so the mappings that must lie side by side go through the C library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Final

_MAP_FIXED: Final = 0x10
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


class SharedPages:
    """Zeroed memory, committed page by page as it is written, that several mappings can share.

    Args:
        length: Bytes, a multiple of the page size.

    Raises:
        OSError: If the system refuses.
    """

    def __init__(self, length: int) -> None:
        self._fd = os.memfd_create("lamplighter-kv", os.MFD_CLOEXEC) if available() else -1
        if self._fd >= 0:
            os.ftruncate(self._fd, length)

    def map(self, offset: int, length: int) -> mmap.mmap:
        """Return a mapping of a part; both numbers are multiples of the page size.

        Raises:
            OSError: If the system refuses.
        """
        if self._fd < 0:
            return mmap.mmap(-1, length)
        return mmap.mmap(self._fd, length, offset=offset)

    def repeat(self, offset: int, length: int, times: int) -> mmap.mmap:
        """Return a mapping of ``times * length`` bytes in which the same part appears ``times`` times.

        Raises:
            OSError: If the system refuses, or has no such memory (``available``).
        """
        region = mmap.mmap(-1, times * length)
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for index in range(times):
            _map_over(base + index * length, length, self._fd, offset)
        return region

    def __del__(self) -> None:
        # The mappings outlive the descriptor.
        if self._fd >= 0:
            os.close(self._fd)


def available() -> bool:
    """Return whether this system can map memory several times: Linux."""
    return sys.platform == "linux"


def _map_over(address: int, length: int, fd: int, offset: int) -> None:
    """Replace the mapping at ``address``, which the caller owns, by a part of the file."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    if library.mmap(address, length, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
