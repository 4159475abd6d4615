from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from lamplighter_agent.errors import BuildError, ChatTemplateError, ConfigError, StoreError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.package.hashing import verify_file
from lamplighter_agent.package.manifest import Manifest, decode_manifest, read_manifest
from lamplighter_builder import weight_file
from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.graph import Graph
from lamplighter_builder.package_writer import PackageWriter
from lamplighter_builder.precision import INT4_FORMAT, INT8_FORMAT, choose_target, describe_precision, quantized_parts
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.quantization.scheme import MatrixRecipe, uniform
from lamplighter_builder.registry import find_architecture
from lamplighter_builder.runner import Runner
from support.tiny_model import TinyShape, build_tiny_package, write_tiny_checkpoint


def manifest_of(package: Path) -> Manifest:
    return decode_manifest((package / "manifest.json").read_bytes())


def test_every_file_is_listed_with_its_digest(tiny_int4: Path) -> None:
    manifest = manifest_of(tiny_int4)
    assert {entry.name for entry in manifest.files} == {path.name for path in tiny_int4.iterdir()} - {"manifest.json"}
    for entry in manifest.files:
        verify_file(tiny_int4 / entry.name, entry)


def test_manifest_says_what_was_built(tiny_int4: Path) -> None:
    manifest = manifest_of(tiny_int4)
    model = manifest.model
    assert (model.model_type, model.vocab_size, model.head_dim, model.tie_word_embeddings) == ("llama", 384, 16, True)
    assert manifest.licence == "Apache-2.0"
    assert manifest.generation.eos_token_ids == (2,)
    assert manifest.memory.kv_bytes_per_token == {"float32": 2 * 2 * 2 * 16 * 4, "int8": 2 * 2 * 2 * 16}
    groups = {group.name: group for group in manifest.precision.groups}
    assert groups["embedding"].length_bytes == 384 * (64 // 2 + 2 * 2 + 1)  # codes, scales, zero points
    assert (groups["linear"].bits, groups["linear"].block_size, groups["linear"].accuracy_level) == (4, 32, 4)
    assert "head" not in groups
    assert manifest.target.operator_domains == {"ai.onnx": 23, "com.microsoft": 1}
    assert manifest.provenance.source == "tiny-llama"
    assert "model.safetensors" in manifest.provenance.source_sha256
    assert manifest.chat_format is not None
    prompt = "".join(segment.text for segment in manifest.chat_format.render([ChatMessage("user", "Hi")]))
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_self_tests_repeat(tiny_int4: Path) -> None:
    manifest, runner = manifest_of(tiny_int4), Runner(tiny_int4 / "model.onnx")
    assert len(manifest.self_tests) == 3
    for test in manifest.self_tests:
        eos = frozenset(manifest.generation.eos_token_ids)
        greedy = runner.greedy(list(test.prompt_tokens), len(test.expected_tokens), eos)
        assert tuple(chosen.token for chosen in greedy) == test.expected_tokens


def test_same_input_gives_the_same_bytes(tiny_checkpoint: Path, tiny_int4: Path, tmp_path: Path) -> None:
    again = build_tiny_package(tiny_checkpoint, tmp_path / "again")
    for path in tiny_int4.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_weights_are_external_aligned_and_stored_once(tiny_int4: Path) -> None:
    model = onnx.load(str(tiny_int4 / "model.onnx"), load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            assert facts["location"] == "model.onnx.data"
            assert int(facts["offset"]) % 4096 == 0
            places[tensor.name] = facts["offset"]
    codes = "model.embed_tokens.weight_codes"
    assert places[f"{codes}_as_matrix"] == places[codes]
    assert len(set(places.values())) == len(places) - 1


def test_graph_meets_the_contract(tiny_int4: Path) -> None:
    graph = onnx.load(str(tiny_int4 / "model.onnx"), load_external_data=False).graph
    inputs = [value.name for value in graph.input]
    cache = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert inputs == ["input_ids", "attention_mask", *cache, "logits_start"]
    presents = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [value.name for value in graph.output] == ["logits", "hidden_states", *presents]
    assert "logits_start" in {tensor.name for tensor in graph.initializer}
    names = [node.name for node in graph.node]
    assert "/model/layers.0/self_attn/qkv_proj/MatMulNBits" in names
    # Ten nodes a layer; the rest is embedding, cache lengths, the slice before the head, last norm and head.
    assert len([name for name in names if not name.startswith("/widen/")]) == 10 * 2 + 9
    assert len(names) == 10 * 2 + 9 + 4 * 2 + 1  # and a cast for the scales of each matrix, computed at load


def test_tokenizer_and_genai_config_are_in_the_package(tiny_int4: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_int4 / "tokenizer.json"))
    assert tokenizer.encode("<|im_end|>").ids == [2]
    config = json.loads((tiny_int4 / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 2
    assert config["model"]["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (errno.ENOSPC, "disk_full", "the disk is full"),
        (errno.EDQUOT, "disk_full", "the disk is full"),
        (errno.EFBIG, "disk_full", "a file may not become as large there"),
        (errno.EIO, "store", "Input/output error"),
        (errno.EROFS, "store", "Read-only file system"),
    ],
)
def test_disk_that_fails_is_told_and_nothing_is_left(
    code: int, reason: str, words: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(weight_file.WeightFile, "append", fail)
    with pytest.raises(StoreError, match=f"out: {words}") as caught:
        build_tiny_package(tiny_checkpoint, tmp_path / "out" / "package")
    assert (caught.value.reason, caught.value.exit_code) == (reason, 6)
    assert list((tmp_path / "out").iterdir()) == []


def test_target_that_is_not_empty_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        build_tiny_package(tiny_checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_empty_target_is_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    assert (build_tiny_package(tiny_checkpoint, tmp_path / "package") / "manifest.json").is_file()


def test_target_that_is_filled_meanwhile_stays(tiny_int4: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    with PackageWriter(target) as writer:
        target.mkdir()
        (target / "other.txt").touch()
        with pytest.raises(BuildError, match="cannot put the package there"):
            writer.finish(manifest_of(tiny_int4))
    assert [path.name for path in tmp_path.rglob("*")] == ["package", "other.txt"]


def test_template_that_cannot_be_compiled_stops_the_build_unless_a_format_is_given(
    tiny_int4: Path, tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"
    checkpoint = write_tiny_checkpoint(tmp_path / "odd", TinyShape(num_hidden_layers=1), chat_template=template)
    with pytest.raises(ChatTemplateError):
        build_tiny_package(checkpoint, tmp_path / "package")
    chat_format = manifest_of(tiny_int4).chat_format
    options = BuildOptions(
        output=tmp_path / "package", precision="int4", name="odd", version="1", chat_format=chat_format
    )
    manifest = build_package(HuggingFaceCheckpoint(checkpoint), options, SilentProgress())
    assert manifest.chat_format == chat_format


def test_memory_needs_count_repacked_matrices(tiny_int4: Path) -> None:
    manifest = manifest_of(tiny_int4)
    stored = sum(group.length_bytes for group in manifest.precision.groups)
    assert manifest.memory.weights_bytes > stored
    assert manifest.memory.weights_bytes < 3 * stored


def test_int8_package_stores_a_tied_table_once_in_blocks_of_32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = manifest_of(build_tiny_package(tiny_checkpoint, tmp_path / "package", "int8"))
    groups = {group.name: group for group in manifest.precision.groups}
    assert (manifest.precision.name, set(groups)) == ("int8", {"embedding", "linear", "norm", "rope"})
    assert groups["embedding"].length_bytes == 384 * (64 + 2 * 2)
    assert (groups["linear"].dtype, groups["linear"].bits, groups["linear"].block_size) == ("uint8", 8, 32)


def test_a_scheme_gives_each_layer_a_format_of_its_own(tiny_checkpoint: Path) -> None:
    coarse, fine = uniform(INT4_FORMAT, quantize_rtn), uniform(INT8_FORMAT, quantize_rtn)

    def scheme(module: str) -> MatrixRecipe:
        return (fine if module.endswith("down_proj") else coarse)(module)

    config = HuggingFaceCheckpoint(tiny_checkpoint).config
    architecture = find_architecture("llama")
    graph = Graph("mixed")
    architecture.make(config, quantized_parts(scheme)).build(graph)
    groups = {
        group.name: (group.bits, group.length_bytes)
        for group in describe_precision("int4", choose_target("int4", "cpu"), graph).groups
    }
    assert groups["linear.8bit-32"] == (8, 2 * 64 * (96 + 3 * 2))
    assert groups["linear"][0] == 4


def test_fp32_package_stores_a_tied_table_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = manifest_of(build_tiny_package(tiny_checkpoint, tmp_path / "package", "fp32"))
    stored = sum(group.length_bytes for group in manifest.precision.groups if group.name != "rope")
    assert stored == manifest.model.parameters * np.dtype(np.float32).itemsize
    assert msgspec.structs.asdict(manifest.precision)["name"] == "fp32"


def test_model_that_onnxruntime_cannot_load_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BuildError, match="cannot load it"):
        Runner(tmp_path / "model.onnx")


@pytest.mark.smollm2
def test_real_int4_package_knows_the_capital_of_france(smollm2_gguf: Path, tmp_path: Path) -> None:
    options = BuildOptions(output=tmp_path / "package", precision="int4", name="smollm2", version="1")
    manifest = build_package(GgufCheckpoint(smollm2_gguf), options, SilentProgress())
    tokenizer = Tokenizer.from_file(str(tmp_path / "package" / "tokenizer.json"))
    answer, prompt = manifest.self_tests[0].expected_tokens, manifest.self_tests[0].prompt_tokens
    assert "What is the capital of France?" in tokenizer.decode(list(prompt))
    assert "Paris" in tokenizer.decode(list(answer))
    assert manifest.total_bytes < 90e6


def test_rows_of_rotary_tables_that_no_text_reaches_are_not_counted(tmp_path: Path) -> None:
    needs = []
    for context in (4096, 65536):
        shape = TinyShape(max_position_embeddings=context)
        checkpoint = write_tiny_checkpoint(tmp_path / f"checkpoint-{context}", shape)
        package = build_tiny_package(checkpoint, tmp_path / f"package-{context}", "fp32")
        needs.append(read_manifest(package).memory.weights_bytes)
    assert needs[0] == needs[1]
