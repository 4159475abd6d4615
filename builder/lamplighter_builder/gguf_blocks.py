"""GGUF blocks that are ``MatMulNBits`` blocks in another order of bytes: they are moved, not quantized again.

Both formats cut a row into blocks of 32 weights with one float16 scale d in front, and stand for ``d * (q - zero)``:

- ``Q4_0``: 16 bytes; byte i holds code i in its low half and code i + 16 in its high half; zero is 8.
- ``Q8_0``: 32 signed bytes; zero is 0, which as an unsigned code is 128.

float16 scales are float32 scales without loss. ``Q4_1`` and the K kinds have a float minimum a block, for which there
is no integer zero point in general.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import gguf
import numpy as np

from lamplighter_builder.quantization.blockwise import BlockFormat, CodeArray, QuantizedMatrix

_BLOCK_SIZE: Final = 32
_SCALE_BYTES: Final = 2

EXACT_KINDS: Final[Mapping[gguf.GGMLQuantizationType, BlockFormat]] = MappingProxyType(
    {
        gguf.GGMLQuantizationType.Q4_0: BlockFormat(bits=4, block_size=_BLOCK_SIZE, symmetric=True),
        gguf.GGMLQuantizationType.Q8_0: BlockFormat(bits=8, block_size=_BLOCK_SIZE, symmetric=True),
    }
)
"""Stored kinds that map exactly, and the format that they map to."""


def exact_matrix(raw: CodeArray, kind: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> QuantizedMatrix:
    """Return stored blocks as codes and scales.

    Args:
        raw: uint8, all bytes of the tensor.
        kind: One of ``EXACT_KINDS``.
        shape: (N, K); K is a multiple of 32.
    """
    rows, blocks = shape[0], shape[1] // _BLOCK_SIZE
    fields = raw.reshape(rows, blocks, -1)
    scales = fields[:, :, :_SCALE_BYTES].copy().view("<f2").astype(np.float32).reshape(rows, blocks)
    stored = fields[:, :, _SCALE_BYTES:]
    if kind == gguf.GGMLQuantizationType.Q4_0:
        codes = np.concatenate([stored & np.uint8(0x0F), stored >> np.uint8(4)], axis=2)
    else:
        codes = stored ^ np.uint8(0x80)  # adds 128 to a two's complement byte
    return QuantizedMatrix(format=EXACT_KINDS[kind], codes=codes.reshape(shape), scales=scales)
