from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamplighter_agent.errors import CheckpointError, ConfigError, UnsupportedModelError, WeightMismatchError
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.fields import Fields
from lamplighter_builder.sources import default_name, open_checkpoint
from support.packages import load_manifest
from support.tiny_model import build_tiny_package

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def change_config(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(checkpoint / WEIGHTS)
    change(weights)
    save_file(weights, checkpoint / WEIGHTS)


def assert_build_fails(checkpoint: Path, error: type[Exception], match: str) -> pytest.ExceptionInfo[Exception]:
    output = checkpoint.parent / "package"
    with pytest.raises(error, match=match) as caught:
        build_tiny_package(checkpoint, output)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    return caught


def test_half_precision_is_widened_exactly(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        save_file({name: values.to(dtype) for name, values in weights.items()}, copy / WEIGHTS)
        checkpoint = HuggingFaceCheckpoint(copy)
        for name, values in weights.items():
            found = checkpoint.read(name)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, values.to(dtype).float().numpy())


def test_shards_are_read_through_the_index(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, copy / file)
    (copy / WEIGHTS).unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = HuggingFaceCheckpoint(copy)
    assert checkpoint.tensors.keys() == weights.keys()
    np.testing.assert_array_equal(checkpoint.read(names[1]), weights[names[1]].numpy())
    (copy / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        HuggingFaceCheckpoint(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert_build_fails(copy, CheckpointError, r"pickled \(pytorch_model.bin\)")


def test_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert_build_fails(copy, CheckpointError, "neither model.safetensors nor")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.6, 0.999])
def test_truncated_safetensors_are_refused(copy: Path, keep: float) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: int(len(data) * keep)])
    assert_build_fails(copy, CheckpointError, "model.safetensors")


def test_chat_template_that_is_no_text_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert_build_fails(copy, CheckpointError, r"chat_template\.jinja: cannot be read: 'utf-8'")


def test_model_of_one_position_is_refused(copy: Path) -> None:
    change_config(copy, max_position_embeddings=1)
    assert_build_fails(copy, CheckpointError, "max_position_embeddings is 1, but must be from 2 to")


def test_notices_whose_names_become_the_same_are_numbered(copy: Path, tmp_path: Path) -> None:
    for name in ("NOTICE (1)", "NOTICE [1]", "NOTICE_(1)"):
        (copy / name).write_text(name)
    package = build_tiny_package(copy, tmp_path / "package", "fp32")
    names = ("NOTICE__1_", "NOTICE__1_.2", "NOTICE__1_.3")
    assert {(package / name).read_text() for name in names} == {"NOTICE (1)", "NOTICE [1]", "NOTICE_(1)"}


def test_damaged_safetensors_header_is_refused(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (copy / WEIGHTS).write_bytes(data)
    assert_build_fails(copy, CheckpointError, "header is damaged")


def test_safetensors_shape_that_disagrees_with_its_bytes_is_refused(copy: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert_build_fails(copy, CheckpointError, "tensor x of shape")


def test_integer_weights_are_refused(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert_build_fails(copy, CheckpointError, "model.norm.weight is stored as I8")


def test_wrong_shape_names_tensor_and_both_shapes(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.ones(63)}))
    assert_build_fails(copy, CheckpointError, r"model.norm.weight has shape \[63\], but must be \[64\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(copy: Path, value: float) -> None:
    change_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.full((64,), value)}))
    assert_build_fails(copy, CheckpointError, "model.norm.weight holds NaN or infinite values")


def test_missing_and_unused_tensors_are_both_named(copy: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        weights["model.final.weight"] = weights.pop("model.norm.weight")

    change_weights(copy, rename)
    caught = assert_build_fails(copy, WeightMismatchError, r"missing: model\.norm.*not used: model\.final")
    assert isinstance(caught.value, WeightMismatchError)
    assert caught.value.missing == ("model.norm.weight",)
    assert caught.value.unused == ("model.final.weight",)


def test_stored_copy_of_a_tied_head_is_not_used(copy: Path, tmp_path: Path) -> None:
    change_weights(
        copy, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    package = build_tiny_package(copy, tmp_path / "package")
    assert json.loads((package / "manifest.json").read_text())["model"]["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"hidden_size": None}, CheckpointError, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, CheckpointError, "hidden_size is '64', but must be a whole number"),
        ({"num_hidden_layers": True}, CheckpointError, "num_hidden_layers is True"),
        ({"model_type": "mamba"}, UnsupportedModelError, "'mamba' is not supported"),
        ({"hidden_act": "relu6"}, UnsupportedModelError, "activation 'relu6'"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
            UnsupportedModelError,
            "rope type 'spiral' is not supported",
        ),
        ({"vocab_size": 300}, CheckpointError, r"embed_tokens.weight has shape \[384, 64\], but must be \[300, 64\]"),
    ],
)
def test_config_that_cannot_be_built(
    copy: Path, changes: dict[str, object], error: type[Exception], match: str
) -> None:
    change_config(copy, **changes)
    assert_build_fails(copy, error, match)


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert_build_fails(copy, CheckpointError, r"config\.json: not JSON")


def test_vocabulary_larger_than_the_embedding_is_refused(copy: Path) -> None:
    def shrink(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:380].clone()

    change_weights(copy, shrink)
    change_config(copy, vocab_size=380)
    assert_build_fails(copy, CheckpointError, r"tokenizer\.json: has ids up to 383, but the embedding has 380 rows")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, "LicenseRef-Unknown"),
        ("---\nlicense: other\n---\n", "LicenseRef-Unknown"),
        ("---\nlicense: bigscience bloom/rail 1.0\n---\n", "LicenseRef-bigscience-bloom-rail-1.0"),
        ("---\nlicense: MIT\n---\n", "MIT"),
    ],
)
def test_licence_is_what_the_card_says(copy: Path, tmp_path: Path, card: str | None, licence: str) -> None:
    (copy / "README.md").unlink()
    if card is not None:
        (copy / "README.md").write_text(card)
    package = build_tiny_package(copy, tmp_path / "package")
    assert load_manifest(package).licence == licence


def test_licence_texts_go_into_the_package(copy: Path, tmp_path: Path) -> None:
    (copy / "LICENSE").write_text("Do what you like.")
    (copy / "Notice (draft).txt").write_text("By many.")
    package = build_tiny_package(copy, tmp_path / "package")
    roles = {entry["name"]: entry["role"] for entry in json.loads((package / "manifest.json").read_text())["files"]}
    assert (roles["LICENSE"], roles["Notice__draft_.txt"]) == ("notice", "notice")
    assert (package / "LICENSE").read_text() == "Do what you like."


def test_old_spelling_of_rope_is_read(copy: Path) -> None:
    from lamplighter_builder.components.rope import Llama3Rope, read_rope

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    found = read_rope(Fields({"rope_theta": 500000.0, "rope_scaling": scaling}, "config.json"), 64)
    assert found == Llama3Rope(500000.0, 64, 8.0, 1.0, 4.0, 8192)
    linear = read_rope(Fields({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json"), 64)
    assert (linear.rope_type, linear.theta, linear.factor) == ("linear", 10000.0, 2.0)


def test_what_m_names(copy: Path, tmp_path: Path) -> None:
    assert isinstance(open_checkpoint(str(copy), None), HuggingFaceCheckpoint)
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_checkpoint(str(tmp_path / "nowhere" / "x" / "y"), None)
    (tmp_path / "model.zip").touch()
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_checkpoint(str(tmp_path / "model.zip"), None)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct-int4"),
        ("model-Q4_K_M", "model-int4"),
        ("model.f16", "model-int4"),
        ("Phi 3 (mini)", "phi-3-mini-int4"),
    ],
)
def test_default_package_name(stem: str, name: str) -> None:
    assert default_name(stem, "int4") == name
