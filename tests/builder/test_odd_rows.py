"""Matrices whose rows are no whole blocks of 32 weights stay floats, and the package works all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lamplighter_agent.package.manifest import read_manifest
from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.cli import main
from lamplighter_builder.parity import Reference, compare_logits
from lamplighter_builder.precision import QuantizationOptions
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.runner import Runner
from support.parity_depths import random_tokens
from support.tiny_model import build_tiny_package, save_checkpoint, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": tiny_tokenizer().get_vocab_size(),
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_type", "sizes", "floats"),
    [
        ("llama", {"hidden_size": 64, "intermediate_size": 37}, {"linear"}),
        ("qwen3", {"hidden_size": 72, "intermediate_size": 96, "tie_word_embeddings": True}, {"linear", "embedding"}),
        ("phimoe", {"hidden_size": 64, "intermediate_size": 40, "num_local_experts": 3}, {"experts"}),
    ],
)
def test_they_are_stored_as_they_are(model_type: str, sizes: dict[str, int], floats: set[str], tmp_path: Path) -> None:
    from transformers import AutoConfig

    checkpoint = save_checkpoint(tmp_path / "model", AutoConfig.for_model(model_type, **SIZES, **sizes), seed=1)
    package = build_tiny_package(checkpoint, tmp_path / "package", "int8")
    groups = read_manifest(package).precision.groups
    assert {group.name.partition(".")[0] for group in groups if group.dtype == "float32"} >= floats
    assert any(group.dtype == "uint8" for group in groups)
    runner, prompt = Runner(package / "model.onnx"), random_tokens(1, 30)
    found = compare_logits(Reference.load(checkpoint).logits(prompt), runner.run(prompt, runner.empty_cache())[0])
    assert found.kl_mean < 0.1


def test_a_calibration_leaves_them_out(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, hidden_size=64, intermediate_size=40)
    checkpoint = save_checkpoint(tmp_path / "model", config, seed=1)
    options = BuildOptions(
        output=tmp_path / "package",
        precision="int4",
        name="tiny",
        version="1",
        quantization=QuantizationOptions(quantizer="gptq"),
        measure_fidelity=False,
    )
    manifest = build_package(HuggingFaceCheckpoint(checkpoint), options, SilentProgress())
    assert {(group.name, group.bits) for group in manifest.precision.groups} >= {("linear", 4), ("linear.float32", 32)}


def test_a_mixture_of_odd_sizes_is_compared_with_the_checkpoint(tmp_path: Path) -> None:
    from transformers import PhimoeConfig

    config = PhimoeConfig(**SIZES, hidden_size=66, intermediate_size=130, num_local_experts=3)
    checkpoint = save_checkpoint(tmp_path / "model", config, seed=1)
    assert main(["build", "-m", str(checkpoint), "-o", str(tmp_path / "package"), "-p", "fp32"]) == 0
    fidelity = read_manifest(tmp_path / "package").fidelity
    assert fidelity is not None
    assert fidelity.kl_mean < 1e-6
