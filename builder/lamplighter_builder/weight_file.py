"""The file of external weights: tensors appended one by one, each at a page boundary so that it can be mapped."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from lamplighter_builder.graph import Array, Region

ALIGNMENT_BYTES: Final = 4096


def place(position: int, length: int) -> Region:
    """Return where a tensor of ``length`` bytes lies that is appended to a file of ``position`` bytes."""
    return Region(position + -position % ALIGNMENT_BYTES, length)


class WeightFile:
    """A new file of weights. Use it as a context manager; leaving it makes the file durable.

    Raises:
        FileExistsError: If there is a file at ``path``.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("xb")
        self._position = 0

    def append(self, array: Array) -> Region:
        """Write a tensor's bytes, little-endian and row by row, and return where they lie.

        Raises:
            OSError: If the disk is full or fails.
        """
        region = place(self._position, array.nbytes)
        self._stream.write(bytes(region.offset - self._position))
        self._stream.write(np.ascontiguousarray(array).data.cast("B"))
        self._position = region.offset + region.length
        return region

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
