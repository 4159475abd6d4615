"""GGUF files of every family give the config and the weights of the checkpoint that they were converted from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.components.rope import LongRope
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.graph import Graph
from lamplighter_builder.precision import float_parts
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.registry import find_architecture
from lamplighter_builder.weights import check_weights
from support.families import write_family_checkpoint
from support.gguf_files import write_gguf

MSCALE = 1.243163121016122
CHANGES: dict[str, dict[str, object]] = {
    # What the metadata cannot say: the published models have these values.
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phimoe": {"router_jitter_noise": 0.01, "rope_parameters": {"short_mscale": MSCALE, "long_mscale": MSCALE}},
    "qwen2-yarn-windowed": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
}
FAMILIES = [
    "llama",
    "llama-linear",
    "qwen2",
    "qwen2-yarn-windowed",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "phi3-longrope",
    "phi3-partial-longrope",
    "phimoe",
]


def family_checkpoint(directory: Path, family: str) -> HuggingFaceCheckpoint:
    path = write_family_checkpoint(directory, family) / "config.json"
    config = json.loads(path.read_text())
    for key, value in CHANGES.get(family, {}).items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return HuggingFaceCheckpoint(directory)


def assert_equal_weights(found: GgufCheckpoint, expected: HuggingFaceCheckpoint) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        # One is added to a norm of Gemma in float32 and taken away again.
        np.testing.assert_allclose(found.read(name), expected.read(name), rtol=0, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_come_back(tmp_path: Path, family: str) -> None:
    expected = family_checkpoint(tmp_path / "original", family)
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", expected))
    architecture = find_architecture(expected.config.text("model_type"))
    config, wanted = architecture.read_config(found.config), architecture.read_config(expected.config)
    if isinstance(config.rope, LongRope) and isinstance(wanted.rope, LongRope):
        # The file has the amplitude as a float32.
        assert np.float32(config.rope.long_amplitude) == np.float32(wanted.rope.long_amplitude)
        rope = replace(
            wanted.rope, short_amplitude=config.rope.short_amplitude, long_amplitude=config.rope.long_amplitude
        )
        wanted = replace(wanted, rope=rope)
    assert config == wanted
    assert_equal_weights(found, expected)
    graph = Graph("x")
    architecture.make(found.config, float_parts()).build(graph)
    check_weights(graph, found, tied=found.config.flag("tie_word_embeddings"))


def test_stacked_projections_of_phi2_are_cut_apart(tmp_path: Path) -> None:
    expected = family_checkpoint(tmp_path / "original", "phi")
    path = write_gguf(tmp_path / "x.gguf", expected, fused=True)
    assert_equal_weights(GgufCheckpoint(path), expected)


def test_mistral_is_stored_as_llama(tmp_path: Path) -> None:
    expected = family_checkpoint(tmp_path / "original", "mistral-unwindowed")
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", expected))
    assert found.config.text("model_type") == "llama"
    assert_equal_weights(found, expected)


def test_frequency_factors_that_no_llama_has_are_kept_as_they_are(tmp_path: Path) -> None:
    expected = family_checkpoint(tmp_path / "original", "llama-scaled")
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", expected))
    architecture = find_architecture("llama")
    rope = architecture.read_config(found.config).rope
    assert isinstance(rope, LongRope)
    wanted = architecture.read_config(expected.config).rope.tables(512)
    for table, other in zip(rope.tables(512), wanted, strict=True):
        np.testing.assert_allclose(table, other, atol=2e-5)


def test_frequency_factors_of_llama3_are_named(tmp_path: Path) -> None:
    write_family_checkpoint(tmp_path / "original", "llama-scaled")
    path = tmp_path / "original" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    path.write_text(json.dumps(config))
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", HuggingFaceCheckpoint(tmp_path / "original")))
    assert found.config.values["rope_parameters"] == config["rope_parameters"]


@pytest.mark.parametrize("family", ["llama-linear", "qwen2", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_weights(tmp_path: Path, family: str) -> None:
    """The files of these tests are what transformers takes for GGUF too."""
    expected = family_checkpoint(tmp_path / "original", family)
    path = write_gguf(tmp_path / "x.gguf", expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    found, values = GgufCheckpoint(path), model.state_dict()
    for name in found.tensors:
        np.testing.assert_array_equal(found.read(name), values[name].numpy(), err_msg=name)


KINDS = gguf.GGMLQuantizationType
QUANTIZED = [KINDS.F16, KINDS.BF16, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0]
BLOCKS_OF_256 = [KINDS.Q2_K, KINDS.Q3_K, KINDS.Q4_K, KINDS.Q5_K, KINDS.Q6_K, KINDS.IQ4_XS, KINDS.IQ4_NL]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_kinds_come_back_near_their_values(
    tiny_checkpoint: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    original = HuggingFaceCheckpoint(tiny_checkpoint)
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", original, kind=kind))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        values = original.read(name)
        assert found.tensors[name].dtype == kind.name
        # A sixteenth of the range for four bits, less for more.
        assert np.abs(found.read(name) - values).max() <= np.abs(values).max() / 7


@pytest.mark.parametrize("kind", BLOCKS_OF_256)
def test_larger_blocks_are_dequantized_as_the_gguf_package_does(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    """The package cannot write these kinds, so the blocks are random bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(3)
    raw = generator.integers(0, 60, (8, 512 // block * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    add_smallest_model(writer)
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    finish(writer)
    found = GgufCheckpoint(tmp_path / "x.gguf").read("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(raw, kind))


def test_split_file_is_read_from_its_first_part(tmp_path: Path) -> None:
    names = [tmp_path / f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    norm, table = np.ones(32, dtype=np.float32), np.ones((8, 32), dtype=np.float32)
    for path, name, values in zip(names, ["output_norm.weight", "token_embd.weight"], [norm, table], strict=True):
        writer = gguf.GGUFWriter(path, "qwen2")
        if path == names[0]:
            add_smallest_model(writer, with_embedding=False)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(name, values)
        finish(writer)
    found = GgufCheckpoint(names[0])
    assert found.tensors.keys() == {"model.norm.weight", "model.embed_tokens.weight"}
    np.testing.assert_array_equal(found.read("model.embed_tokens.weight"), table)
    assert found.files == tuple(names)
    with pytest.raises(CheckpointError, match="is one of 2 files of a split model"):
        GgufCheckpoint(names[1])
    names[1].unlink()
    with pytest.raises(CheckpointError, match=r"x-00002-of-00002\.gguf"):
        GgufCheckpoint(names[0])


def test_package_from_a_gguf_file_answers_as_the_one_from_its_original(tmp_path: Path) -> None:
    expected = family_checkpoint(tmp_path / "original", "qwen3")
    found = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", expected, pre="gpt-2"))
    tests = []
    for name, checkpoint in (("a", expected), ("b", found)):
        options = BuildOptions(output=tmp_path / name, precision="fp32", name="tiny", version="1", licence="MIT")
        tests.append(build_package(checkpoint, options, SilentProgress()).self_tests)
    # The file has no chat template, so the prompts differ; the weights do not.
    assert (tmp_path / "a" / "model.onnx.data").read_bytes() == (tmp_path / "b" / "model.onnx.data").read_bytes()
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
    assert len(tests[1]) == len(tests[0])


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("qwen2.block_count", None, CheckpointError, "'qwen2.block_count' is missing"),
        ("qwen2.rope.scaling.type", "spiral", UnsupportedModelError, "rope.scaling.type 'spiral' is not supported"),
        ("qwen2.embedding_length", "x", CheckpointError, "embedding_length is 'x', but must be a whole number"),
    ],
)
def test_metadata_that_cannot_be_built_is_refused(
    tmp_path: Path, key: str, value: str | None, error: type[Exception], match: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    add_smallest_model(writer)
    for fields in writer.kv_data:  # one dict a file
        fields.pop(key, None)
    if value is not None:
        writer.add_string(key, value)
    finish(writer)
    with pytest.raises(error, match=match):
        GgufCheckpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["blk.0.ssm_a.weight", "cls.weight", "blk.x.attn_q.weight"])
def test_unknown_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    add_smallest_model(writer)
    writer.add_tensor(name, np.ones(32, dtype=np.float32))
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=f"tensor '{name}' is unknown"):
        GgufCheckpoint(tmp_path / "x.gguf")


def add_smallest_model(writer: gguf.GGUFWriter, *, with_embedding: bool = True) -> None:
    """Add the metadata of a Qwen2 of one layer and, if asked, its embedding."""
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    if with_embedding:
        writer.add_tensor("token_embd.weight", np.ones((8, 32), dtype=np.float32))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
