"""Quantized matrices between calibration and the package: on disk, since together they may be larger than memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix


class MatrixStore:
    """Quantized matrices on disk, one file each, until the package is written.

    Args:
        directory: Where; it exists.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._formats: dict[str, BlockFormat] = {}

    def add(self, name: str, matrix: QuantizedMatrix) -> None:
        """Keep a matrix."""
        zero_points = np.empty(0, dtype=np.uint8) if matrix.zero_points is None else matrix.zero_points
        np.savez(self._directory / f"{name}.npz", codes=matrix.codes, scales=matrix.scales, zero_points=zero_points)
        self._formats[name] = matrix.format

    def get(self, name: str) -> QuantizedMatrix | None:
        """Return a matrix, or None if it was never added."""
        block_format = self._formats.get(name)
        if block_format is None:
            return None
        with np.load(self._directory / f"{name}.npz") as arrays:
            zero_points = None if block_format.symmetric else arrays["zero_points"]
            return QuantizedMatrix(block_format, arrays["codes"], arrays["scales"], zero_points)


class CalibratedWeights:
    """The weights of a checkpoint, matrices quantized where a store has them."""

    def __init__(self, checkpoint: Checkpoint, store: MatrixStore) -> None:
        self.path = checkpoint.path
        self._checkpoint, self._store = checkpoint, store

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32.

        Raises:
            CheckpointError: If a file ends early or a stored type is no float.
        """
        return self._checkpoint.read(name)

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Return the calibrated matrix, or what the checkpoint holds."""
        return self._store.get(name) or self._checkpoint.quantized(name)
