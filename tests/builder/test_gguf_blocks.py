"""Blocks of GGUF that are blocks of MatMulNBits are moved bit for bit."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.gguf_blocks import exact_matrix
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix, convert_exactly, stack_matrices
from support.gguf_files import write_gguf

KINDS = gguf.GGMLQuantizationType


def stored_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """Blocks of random bytes behind finite float16 scales: every code occurs, not only those that a quantizer makes."""
    generator = np.random.default_rng(5)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (shape[0], shape[1] // size, block_bytes), dtype=np.uint8)
    scales = generator.normal(0, 0.1, raw.shape[:2]).astype(np.float16)
    scales[0, 0], scales[-1, -1] = 0.0, np.float16(6e-8)
    raw[:, :, :2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q8_0])
def test_blocks_dequantize_to_the_values_of_the_gguf_package(kind: gguf.GGMLQuantizationType) -> None:
    raw = stored_blocks(kind, (24, 96))
    matrix = exact_matrix(raw.reshape(-1), kind, (24, 96))
    expected = gguf.quants.dequantize(raw.reshape(24, -1), kind)
    np.testing.assert_array_equal(matrix.dequantize().view(np.uint32), expected.view(np.uint32))


def test_codes_and_scales_are_the_stored_bits() -> None:
    """One block by hand, read with struct as the format describes it."""
    raw = stored_blocks(KINDS.Q4_0, (1, 32)).reshape(-1)
    raw[:2] = np.frombuffer(struct.pack("<e", -0.375), dtype=np.uint8)
    matrix = exact_matrix(raw, KINDS.Q4_0, (1, 32))
    assert matrix.scales.tolist() == [[-0.375]]
    assert matrix.codes[0].tolist() == [int(byte) % 16 for byte in raw[2:]] + [int(byte) // 16 for byte in raw[2:]]
    raw = stored_blocks(KINDS.Q8_0, (1, 32)).reshape(-1)
    matrix = exact_matrix(raw, KINDS.Q8_0, (1, 32))
    assert (matrix.codes[0].astype(int) - 128).tolist() == list(struct.unpack("<32b", raw[2:].tobytes()))


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q8_0])
def test_package_holds_the_stored_codes(tiny_checkpoint: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Query and key rows go back to Hugging Face's order, the three projections are stacked, and no code changes."""
    original = HuggingFaceCheckpoint(tiny_checkpoint)
    path = write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    checkpoint = GgufCheckpoint(path)
    options = BuildOptions(output=tmp_path / "package", precision="int4", name="tiny", version="1.0.0")
    build_package(checkpoint, options, SilentProgress())
    model = onnx.load(tmp_path / "package" / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = "model.layers.1.self_attn.qkv_proj"
    found = np.concatenate([tensors[f"{name}.weight_codes"] & 15, tensors[f"{name}.weight_codes"] >> 4], axis=2)
    expected = np.concatenate(
        [
            gguf.quants.quantize(original.read(f"model.layers.1.self_attn.{part}_proj.weight"), kind).reshape(-1, 2, 18)
            if kind == KINDS.Q4_0
            else np.empty((0, 2, 18), dtype=np.uint8)
            for part in "qkv"
        ]
    )
    if kind == KINDS.Q8_0:  # eight bits do not fit into four: quantized again
        assert checkpoint.quantized("model.layers.1.self_attn.q_proj.weight") is not None
        assert np.abs(tensors[f"{name}.weight_scales"]).max() > 0
        return
    # The file keeps code i beside code i + 16, MatMulNBits code 2i beside code 2i + 1.
    stored = np.concatenate([expected[:, :, 2:] & 15, expected[:, :, 2:] >> 4], axis=2)
    np.testing.assert_array_equal(found, np.concatenate([stored[:, :, 0::2], stored[:, :, 1::2]], axis=2))
    scales = expected[:, :, :2].copy().view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(tensors[f"{name}.weight_scales"], scales.astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_conversion_keeps_every_value(bits: int, block_size: int, symmetric: bool) -> None:
    matrix = exact_matrix(stored_blocks(KINDS.Q4_0, (8, 64)).reshape(-1), KINDS.Q4_0, (8, 64))
    found = convert_exactly(matrix, BlockFormat(bits=bits, block_size=block_size, symmetric=symmetric))
    assert found is not None
    assert found.format == BlockFormat(bits=bits, block_size=block_size, symmetric=symmetric)
    np.testing.assert_array_equal(found.dequantize(), matrix.dequantize())


def test_what_cannot_be_exact_is_not_converted() -> None:
    eight = exact_matrix(stored_blocks(KINDS.Q8_0, (8, 64)).reshape(-1), KINDS.Q8_0, (8, 64))
    assert convert_exactly(eight, BlockFormat(bits=4, block_size=32, symmetric=True)) is None
    assert convert_exactly(eight, BlockFormat(bits=8, block_size=64, symmetric=True)) is None
    with_zero_points = QuantizedMatrix(
        format=BlockFormat(bits=8, block_size=32, symmetric=False),
        codes=eight.codes,
        scales=eight.scales,
        zero_points=np.full(eight.scales.shape, 3, dtype=np.uint8),
    )
    assert convert_exactly(with_zero_points, eight.format) is None
    assert stack_matrices([eight, with_zero_points]) is None
