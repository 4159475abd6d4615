from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.components.embedding import EmbeddingSpec, QuantizedEmbeddingFactory
from lamplighter_builder.components.linear import LinearSpec, QuantizedLinear, linear_source
from lamplighter_builder.graph import FloatArray, Graph
from lamplighter_builder.quantization.blockwise import BlockFormat, pack, unpack
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.quantization.scheme import uniform
from lamplighter_builder.weight_file import WeightFile

FORMATS = [
    BlockFormat(bits=bits, block_size=size, symmetric=symmetric)
    for bits in (4, 5, 6, 8)
    for size in (16, 32)
    for symmetric in (True, False)
]


def test_four_bit_codes_are_packed_low_half_first() -> None:
    codes = np.array([[1, 2, 3, 15], [0, 8, 9, 10]], dtype=np.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0xF3], [0x80, 0xA9]]


def test_odd_rows_are_padded_with_zero_bits() -> None:
    codes = np.array([[7, 6, 5]], dtype=np.uint8)
    assert pack(codes, 4).tolist() == [[0x67, 0x05]]
    assert unpack(pack(codes, 4), 4, 3).tolist() == codes.tolist()


def test_symmetric_rounding_puts_the_largest_magnitude_on_the_lowest_code() -> None:
    weight = np.array([[-8, -7, 0, 7, 3.4, 3.6, 1, -1] * 2], dtype=np.float32)
    found = quantize_rtn(weight, BlockFormat(bits=4, block_size=16, symmetric=True))
    assert found.scales.tolist() == [[1.0]]
    assert found.codes[0, :8].tolist() == [0, 1, 8, 15, 11, 12, 9, 7]
    flipped = quantize_rtn(-weight, BlockFormat(bits=4, block_size=16, symmetric=True))
    assert flipped.scales.tolist() == [[-1.0]]
    assert flipped.codes.tolist() == found.codes.tolist()


def test_asymmetric_rounding_reaches_both_ends_and_zero() -> None:
    weight = np.linspace(-3, 12, 16, dtype=np.float32)[None, :]
    found = quantize_rtn(weight, BlockFormat(bits=4, block_size=16, symmetric=False))
    assert found.zero_points is not None
    assert found.zero_points.tolist() == [[3]]
    np.testing.assert_allclose(found.dequantize(), weight, atol=1e-6)


def test_block_of_zeros_stays_zero() -> None:
    for block_format in FORMATS:
        found = quantize_rtn(np.zeros((2, 32), dtype=np.float32), block_format)
        assert not found.dequantize().any()


@pytest.mark.parametrize("block_format", FORMATS)
def test_rounding_error_is_at_most_half_a_step(block_format: BlockFormat) -> None:
    weight = random_weight(8, 64)
    found = quantize_rtn(weight, block_format)
    error = np.abs(found.dequantize() - weight).reshape(8, found.scales.shape[1], -1)
    # Symmetric codes reach one step less far on the other side, so a value there may be a whole step away.
    allowed = 1.0 if block_format.symmetric else 0.5
    assert (error <= np.abs(found.scales[:, :, None]) * allowed + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_large_matrix_are_quantized_as_each_by_itself(symmetric: bool) -> None:
    block_format = BlockFormat(bits=4, block_size=32, symmetric=symmetric)
    weight = random_weight(700, 256)
    found = quantize_rtn(weight, block_format).dequantize()
    for row in (0, 255, 256, 699):
        expected = quantize_rtn(weight[row : row + 1], block_format).dequantize()
        assert found[row].tolist() == expected[0].tolist()


def test_in_features_must_fill_whole_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="40 in features"):
        quantize_rtn(random_weight(2, 40), BlockFormat(bits=4, block_size=32, symmetric=True))


@pytest.mark.parametrize("block_format", FORMATS)
def test_onnxruntime_multiplies_with_the_dequantized_weight(tmp_path: Path, block_format: BlockFormat) -> None:
    weight = random_weight(24, 64)
    graph = Graph("linear")
    x = graph.input("x", np.float32, [1, "rows", 64])
    y = QuantizedLinear(uniform(block_format, quantize_rtn))(
        graph, x, LinearSpec("layer", (linear_source("layer", 24, 64),), 64, 24)
    )
    graph.publish(y, "y", np.float32, [1, "rows", 24])
    session = save_and_load(graph, weight, tmp_path)
    # Rows of one-hot features: activations quantized to int8 represent them exactly.
    found = session.run(["y"], {"x": np.eye(64, dtype=np.float32)[None]})[0]
    np.testing.assert_allclose(found[0].T, quantize_rtn(weight, block_format).dequantize(), atol=1e-6)


@pytest.mark.parametrize("block_format", FORMATS)
def test_onnxruntime_looks_up_the_dequantized_rows_and_shares_them_with_the_head(
    tmp_path: Path, block_format: BlockFormat
) -> None:
    weight = random_weight(24, 64)
    graph = Graph("embedding")
    ids = graph.input("ids", np.int64, [1, "rows"])
    embedding = QuantizedEmbeddingFactory(uniform(block_format, quantize_rtn))(graph, EmbeddingSpec("table", 24, 64))
    hidden = embedding.lookup(graph, ids)
    logits = embedding.project(graph, graph.input("x", np.float32, [1, "features", 64]))
    graph.publish(hidden, "hidden", np.float32, [1, "rows", 64])
    graph.publish(logits, "logits", np.float32, [1, "features", 24])
    session = save_and_load(graph, weight, tmp_path)
    feeds = {"ids": np.arange(24, dtype=np.int64)[None], "x": np.eye(64, dtype=np.float32)[None]}
    rows, columns = session.run(["hidden", "logits"], feeds)
    expected = quantize_rtn(weight, block_format).dequantize()
    np.testing.assert_allclose(rows[0], expected, atol=1e-6)
    np.testing.assert_allclose(columns[0].T, expected, atol=1e-6)


def random_weight(rows: int, columns: int) -> FloatArray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def save_and_load(graph: Graph, weight: FloatArray, directory: Path) -> onnxruntime.InferenceSession:
    regions = {}
    with WeightFile(directory / "data") as file:
        for declared in graph.weights:
            for spec, array in zip(declared.outputs, declared.convert([weight]), strict=True):
                regions[spec.name] = file.append(array)
    model = directory / "model.onnx"
    model.write_bytes(graph.finish("data", regions).SerializeToString())
    return onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
