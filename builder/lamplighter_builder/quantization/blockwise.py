"""Block-wise integers as onnxruntime's ``MatMulNBits`` and ``GatherBlockQuantized`` store them.

A weight [N, K] (N out features, K in features) is cut along K into blocks of ``block_size``. Each block has one float
scale and, if asymmetric, one integer zero point; a stored code ``q`` stands for ``(q - zero_point) * scale``. Without
zero points both operators take ``2 ** (bits - 1)``.

The operators read 4 or 8 bits. Codes of 5 and 6 bits are stored as planes, the upper four bits and the rest, and become
codes of 8 bits when a package is loaded: a file between the two sizes, and the speed and memory of 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import UnsupportedModelError

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]

SUPPORTED_BITS: Final = (4, 5, 6, 8)
SUPPORTED_BLOCK_SIZES: Final = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a matrix is quantized.

    Attributes:
        bits: Bits a weight in the file: 4, 5, 6 or 8.
        block_size: Weights along K that share a scale.
        symmetric: True without zero points.

    Raises:
        ValueError: If a value is not one that onnxruntime's kernels take.
    """

    bits: int
    block_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits is {self.bits}, but must be one of {SUPPORTED_BITS}")
        if self.block_size not in SUPPORTED_BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size}, but must be one of {SUPPORTED_BLOCK_SIZES}")

    @property
    def kernel_bits(self) -> int:
        """Bits of the codes that the operators read, 4 or 8."""
        return 4 if self.bits == 4 else 8

    @property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits of each plane that codes are stored in, the upper ones first; one plane where they are read as such."""
        return (self.bits,) if self.bits == self.kernel_bits else (4, self.bits - 4)

    @property
    def default_zero_point(self) -> int:
        """The code that stands for zero when there are no zero points."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a stored matrix: codes, scales of half precision and zero points."""
        blocks = self.blocks(in_features)
        zero_points = 0 if self.symmetric else -(-blocks * self.kernel_bits // 8)
        return out_features * (in_features * self.bits // 8 + 2 * blocks + zero_points)

    def fits(self, in_features: int) -> bool:
        """Tell whether rows of ``in_features`` weights are whole blocks."""
        return in_features % self.block_size == 0

    def blocks(self, in_features: int) -> int:
        """Return the number of blocks in a row of ``in_features`` weights.

        Raises:
            UnsupportedModelError: If ``in_features`` is no multiple of the block size. The operators would allow a
                padded last block, but then the matrix cannot be shared between embedding and head.
        """
        if not self.fits(in_features):
            raise UnsupportedModelError(
                f"a matrix has {in_features} in features, which is no multiple of the block size {self.block_size}",
                hint="build the model with -p fp16 or -p fp32",
            )
        return in_features // self.block_size


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A quantized weight, unpacked.

    Attributes:
        format: Bits, block size and symmetry.
        codes: uint8 [N, K], one code a weight.
        scales: float32 [N, blocks], each a number of half precision: see :func:`storable_scales`.
        zero_points: uint8 [N, blocks] if asymmetric, otherwise None.
    """

    format: BlockFormat
    codes: CodeArray
    scales: FloatArray
    zero_points: CodeArray | None = None

    def __post_init__(self) -> None:
        blocks = (self.codes.shape[0], self.format.blocks(self.codes.shape[1]))
        if self.scales.shape != blocks:
            raise ValueError(f"scales have shape {self.scales.shape}, but the codes make {blocks} blocks")
        if (self.zero_points is None) != self.format.symmetric:
            raise ValueError("zero points must be given exactly where the format is asymmetric")
        if self.zero_points is not None and self.zero_points.shape != blocks:
            raise ValueError(f"zero points have shape {self.zero_points.shape}, but the codes make {blocks} blocks")

    def dequantize(self) -> FloatArray:
        """Return the float32 weight [N, K] that the operators compute with."""
        rows, blocks = self.scales.shape
        codes = self.codes.reshape(rows, blocks, -1).astype(np.float32)
        zero: FloatArray | float = float(self.format.default_zero_point)
        if self.zero_points is not None:
            zero = self.zero_points.astype(np.float32)[:, :, None]
        return ((codes - zero) * self.scales[:, :, None]).reshape(self.codes.shape)

    def packed_codes(self) -> CodeArray:
        """Return the codes as uint8 [N, blocks, block_size * bits / 8], the even element in the low half of a byte.

        Row by row the bytes equal ``GatherBlockQuantized``'s [N, K * bits / 8]: one blob serves both operators.
        """
        rows, blocks = self.scales.shape
        return pack(self.codes, self.format.bits).reshape(rows, blocks, -1)

    def planes(self) -> list[CodeArray]:
        """Return the planes of codes of 5 or 6 bits, each uint8 [N, 1, K * width / 8], the upper four bits first.

        A byte of a plane holds 8 / width parts of codes; the lowest bits belong to the first features of the row.
        """
        *_, low = self.format.plane_widths
        parts = (self.codes >> np.uint8(low), self.codes & np.uint8((1 << low) - 1))
        return [
            _pack_plane(part, width)[:, None, :] for part, width in zip(parts, self.format.plane_widths, strict=True)
        ]

    def packed_zero_points(self) -> CodeArray | None:
        """Return the zero points as uint8 [N, bytes], packed as the operators read them, or None."""
        return None if self.zero_points is None else pack(self.zero_points, self.format.kernel_bits)


def storable_scales(scales: FloatArray) -> FloatArray:
    """Return scales that a package can store, which are numbers of half precision, as float32.

    They are the next ones that are not smaller in magnitude, so that no block's extremes are clipped. The magnitude is
    at most 65,504.
    """
    limit = np.finfo(np.float16).max
    wanted = scales.clip(-limit, limit)
    stored = wanted.astype(np.float16)
    short = np.abs(stored.astype(np.float32)) < np.abs(wanted)
    with np.errstate(over="ignore"):  # beyond the largest number, which is never short
        away = np.nextafter(stored, np.copysign(np.float16(np.inf), stored))
    return np.where(short, away, stored).astype(np.float32)


def stack_matrices(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Return the matrices stacked along N, or None if their formats differ."""
    first = matrices[0]
    if any(matrix.format != first.format for matrix in matrices):
        return None
    zero_points = [matrix.zero_points for matrix in matrices if matrix.zero_points is not None]
    return QuantizedMatrix(
        format=first.format,
        codes=np.concatenate([matrix.codes for matrix in matrices]),
        scales=np.concatenate([matrix.scales for matrix in matrices]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
    )


def convert_exactly(matrix: QuantizedMatrix, target: BlockFormat) -> QuantizedMatrix | None:
    """Return a matrix in another format that dequantizes to the very same values, or None if there is none.

    Blocks may be cut into smaller ones, a default zero point may be written out, and codes may gain bits.
    """
    source = matrix.format
    if source.block_size % target.block_size or target.bits < source.bits:
        return None
    if target.symmetric and not source.symmetric:
        return None
    repeat = source.block_size // target.block_size
    scales = np.repeat(matrix.scales, repeat, axis=1)
    if target.symmetric:
        shift = np.uint8(target.default_zero_point - source.default_zero_point)
        return QuantizedMatrix(format=target, codes=matrix.codes + shift, scales=scales)
    if matrix.zero_points is None:
        zero_points = np.full(scales.shape, source.default_zero_point, dtype=np.uint8)
    else:
        zero_points = np.repeat(matrix.zero_points, repeat, axis=1)
    return QuantizedMatrix(format=target, codes=matrix.codes, scales=scales, zero_points=zero_points)


def pack(codes: CodeArray, bits: int) -> CodeArray:
    """Pack each row of codes into bytes, low half first.

    Args:
        codes: uint8 [rows, columns], each below ``2 ** bits``.
        bits: 4 or 8.

    Returns:
        uint8 [rows, ceil(columns * bits / 8)].
    """
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def unpack(packed: CodeArray, bits: int, columns: int) -> CodeArray:
    """Undo :func:`pack`.

    Args:
        packed: uint8 [rows, ceil(columns * bits / 8)].
        bits: 4 or 8.
        columns: Codes in a row, without padding.

    Returns:
        uint8 [rows, columns].
    """
    if bits == 8:
        return packed
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2] = packed & 0x0F
    codes[:, 1::2] = packed >> np.uint8(4)
    return codes[:, :columns]


def nonzero(values: FloatArray) -> FloatArray:
    """Return the values with 1 in place of 0, so that a block of zeros divides cleanly."""
    return np.where(values == 0, np.float32(1), values)


def _pack_plane(parts: CodeArray, width: int) -> CodeArray:
    """Pack parts of codes [N, K], each below ``2 ** width``, into bytes [N, K * width / 8]."""
    ranges = np.split(parts, 8 // width, axis=1)
    packed = np.zeros_like(ranges[0])
    for index, part in enumerate(ranges):
        packed |= part << np.uint8(index * width)
    return packed
