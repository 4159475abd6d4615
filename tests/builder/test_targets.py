"""Packages of each precision for each execution provider: structure, types, and the CPU's kernels as far as they go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.errors import BuildError, ConfigError, IncompatiblePackageError
from lamplighter_agent.package.manifest import ExecutionProvider, read_manifest
from lamplighter_agent.update.compatibility import DeviceFacts, check_compatible
from lamplighter_builder.parity import Reference, compare_logits
from lamplighter_builder.precision import FOREIGN_INT4_FORMAT, INT8_FORMAT, PrecisionName
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.runner import IntArray, Runner
from support.families import FAMILIES, LONG_ROPE_SWITCH, write_family_checkpoint
from support.tiny_model import TinyShape, build_tiny_package, write_tiny_checkpoint

HALF_TARGETS: list[tuple[ExecutionProvider, PrecisionName]] = [
    (provider, precision) for provider in ("cuda", "dml") for precision in ("fp16", "int8", "int4")
]
PROMPT: IntArray = np.random.default_rng(3).integers(3, 384, size=(1, 40))


@pytest.fixture(scope="module", params=HALF_TARGETS, ids="-".join)
def foreign_package(
    request: pytest.FixtureRequest, untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A package for another provider, of a checkpoint with biases and a head of its own."""
    provider, precision = request.param
    return build_tiny_package(
        untied_checkpoint, tmp_path_factory.mktemp("target") / "package", precision, execution_provider=provider
    )


def graph_of(package: Path) -> onnx.GraphProto:
    return onnx.load(str(package / "model.onnx"), load_external_data=False).graph


def test_everything_between_the_tokens_is_float16(foreign_package: Path) -> None:
    graph = graph_of(foreign_package)
    values = [*graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }
    assert onnx.TensorProto.FLOAT not in types.values()
    assert types["logits"] == types["past_key_values.0.key"] == onnx.TensorProto.FLOAT16


def test_operators_are_those_of_the_provider(foreign_package: Path) -> None:
    manifest, nodes = read_manifest(foreign_package), list(graph_of(foreign_package).node)
    assert manifest.target.operator_domains == {"ai.onnx": 21, "com.microsoft": 1}
    operators = {node.op_type for node in nodes}
    assert "RMSNormalization" not in operators
    for node in nodes:
        if node.op_type == "MatMulNBits":
            assert len(node.input) == 3  # neither zero points nor bias
            assert "accuracy_level" not in {attribute.name for attribute in node.attribute}
    if manifest.target.execution_provider == "dml":
        assert "GatherBlockQuantized" not in operators
        attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert all(node.input[1] and node.input[2] and len(node.input) == 7 for node in attention)
        assert not any(attribute.name == "do_rotary" for node in attention for attribute in node.attribute)


def test_manifest_and_genai_config_name_the_provider(foreign_package: Path) -> None:
    manifest = read_manifest(foreign_package)
    provider = manifest.target.execution_provider
    assert manifest.memory.kv_bytes_per_token == {"float16": 2 * 2 * 2 * 16 * 2}
    groups = {group.name: group for group in manifest.precision.groups}
    assert (groups["norm"].dtype, groups["linear"].accuracy_level) == ("float16", None)
    decoder = json.loads((foreign_package / "genai_config.json").read_text())["model"]["decoder"]
    assert [list(options) for options in decoder["session_options"]["provider_options"]] == [[provider]]
    assert ("position_ids" in decoder["inputs"]) == (provider == "dml")


def test_cpu_kernels_compute_what_the_weights_say(foreign_package: Path, untied_checkpoint: Path) -> None:
    manifest = read_manifest(foreign_package)
    block_format = {"int4": FOREIGN_INT4_FORMAT, "int8": INT8_FORMAT}.get(manifest.precision.name)
    model = AutoModelForCausalLM.from_pretrained(untied_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # DirectML looks no rows of quantized tables up, so the embedding stays float16 there.
            kept = "embed_tokens" in name and manifest.target.execution_provider == "dml"
            if parameter.dim() == 2 and block_format is not None and not kept:
                parameter.copy_(torch.from_numpy(quantize_rtn(parameter.numpy(), block_format).dequantize()))
    parity = compare_logits(Reference(model).logits(PROMPT), logits_of(foreign_package))
    # float16 keeps ten bits of each sum; in fp32 the same comparison gives 1e-12.
    assert parity.kl_mean < 1e-3
    assert len(manifest.self_tests) == 3


def test_agent_refuses_a_provider_it_has_not_got(foreign_package: Path) -> None:
    manifest = read_manifest(foreign_package)
    provider = manifest.target.execution_provider
    with pytest.raises(IncompatiblePackageError, match=f"is built for {provider}, this device has cpu"):
        check_compatible(manifest, DeviceFacts("9.0", "9.0"))
    with pytest.raises(IncompatiblePackageError, match=f"is built for '{provider}', but this engine runs 'cpu'"):
        Engine.load(foreign_package)


def test_dml_float32_is_rewritten_and_equal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    package = build_tiny_package(tiny_checkpoint, tmp_path / "dml", "fp32", execution_provider="dml")
    expected = Reference.load(tiny_checkpoint).logits(PROMPT)
    assert compare_logits(expected, logits_of(package)).max_difference < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rewritten_for_dml(family: str, tmp_path: Path) -> None:
    """Beyond LongRoPE's switch and the sliding windows too. What the CPU's graph computes is proved elsewhere."""
    checkpoint = write_family_checkpoint(tmp_path / "checkpoint", family)
    package = build_tiny_package(checkpoint, tmp_path / "dml", "fp16", execution_provider="dml")
    prompt = np.random.default_rng(5).integers(3, 384, size=(1, LONG_ROPE_SWITCH + 30))
    expected = logits_of(build_tiny_package(checkpoint, tmp_path / "cpu", "fp32"), prompt)
    # Rounding alone costs less than 1e-3; in a mixture of experts it may move a token near a tie to another expert.
    assert compare_logits(expected, logits_of(package, prompt)).kl_mean < 1e-2


def test_cuda_float32_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="computes in float16 only"):
        build_tiny_package(tiny_checkpoint, tmp_path / "cuda", "fp32", execution_provider="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "untied_checkpoint"])
def test_float16_on_the_cpu_stores_half_and_computes_in_float32(
    checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(checkpoint)
    package = build_tiny_package(path, tmp_path / "package", "fp16")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.half().float())
    assert compare_logits(Reference(model).logits(PROMPT), logits_of(package)).max_difference < 1e-3
    groups = {group.name: group for group in read_manifest(package).precision.groups}
    assert (groups["linear"].dtype, groups["norm"].dtype) == ("float16", "float32")
    full = build_tiny_package(path, tmp_path / "full", "fp32")
    assert groups["linear"].length_bytes * 2 == next(
        group.length_bytes for group in read_manifest(full).precision.groups if group.name == "linear"
    )


def test_value_beyond_float16_stops_the_build(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", TinyShape(num_hidden_layers=1))
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 4] = 1e5
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuildError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: holds 1e\+05"):
        build_tiny_package(checkpoint, tmp_path / "package", "fp16")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
def test_engine_answers_with_every_cpu_precision(
    tiny_checkpoint: Path, precision: PrecisionName, tmp_path: Path
) -> None:
    package = build_tiny_package(tiny_checkpoint, tmp_path / "package", precision)
    test = read_manifest(package).self_tests[0]
    engine = Engine.load(package, options=EngineOptions(threads=1))
    found = [token.token_id for token in engine.generate(list(test.prompt_tokens)) if token.token_id is not None]
    engine.close()
    assert tuple(found[: test.min_matching_tokens]) == test.expected_tokens[: test.min_matching_tokens]
    assert found


def logits_of(package: Path, prompt: IntArray = PROMPT) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    runner = Runner(package / "model.onnx")
    return runner.run(prompt, runner.empty_cache())[0]
