"""LoRA adapters are merged as PEFT's layers compute them; what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamplighter_agent.errors import CheckpointError, LamplighterError, UnsupportedModelError, WeightMismatchError
from lamplighter_agent.package.manifest import read_manifest
from lamplighter_builder.adapter import AdaptedCheckpoint
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.cli import main
from lamplighter_builder.gguf import GgufCheckpoint
from support.gguf_files import write_gguf

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), V: (32, 64), DOWN: (64, 96)}
RANK, ALPHA = 4, 10


def config(**changes: object) -> dict[str, Any]:
    """As PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        **changes,
    }


def factors(ranks: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for module, (rows, columns) in SHAPES.items():
        rank = (ranks or {}).get(module, RANK)
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return found


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """B @ A in float64."""
    name = f"base_model.model.{module}.lora_"
    return tensors[name + "B.weight"].double() @ tensors[name + "A.weight"].double()


@pytest.mark.parametrize(("rslora", "scale"), [(False, ALPHA / RANK), (True, ALPHA / RANK**0.5)])
def test_weights_are_those_of_the_unmerged_layers(
    tiny_checkpoint: Path, tmp_path: Path, rslora: bool, scale: float
) -> None:
    tensors = factors()
    path = write_adapter(tmp_path / "adapter", tensors, config(use_rslora=rslora))
    base = HuggingFaceCheckpoint(tiny_checkpoint)
    adapted = AdaptedCheckpoint(base, path)
    assert adapted.tensors == base.tensors
    stored = load_file(tiny_checkpoint / "model.safetensors")
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, values in stored.items():
        module, found = name.removesuffix(".weight"), torch.from_numpy(adapted.read(name)).double()
        if module not in SHAPES:
            assert torch.equal(found.float(), values)
            continue
        # The layer as PEFT runs it: W x + scale * B (A x).
        inputs = torch.nn.functional.pad(x, (0, SHAPES[module][1] - 64), value=0.5)
        expected = inputs @ values.double().T + scale * (inputs @ product(tensors, module).T)
        torch.testing.assert_close(inputs @ found.T, expected, rtol=1e-5, atol=1e-4)


def test_patterns_give_modules_a_rank_and_an_alpha_of_their_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = factors({V: 2})
    settings = config(rank_pattern={"self_attn.v_proj": 2}, alpha_pattern={r"layers\.1.*down_proj": 3})
    adapted = AdaptedCheckpoint(
        HuggingFaceCheckpoint(tiny_checkpoint), write_adapter(tmp_path / "adapter", tensors, settings)
    )
    stored = load_file(tiny_checkpoint / "model.safetensors")
    for module, scale in ((Q, ALPHA / RANK), (V, ALPHA / 2), (DOWN, 3 / RANK)):
        expected = stored[f"{module}.weight"].double() + scale * product(tensors, module)
        np.testing.assert_allclose(adapted.read(f"{module}.weight"), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_embedding_that_shares_its_tensor_with_the_head_is_parted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    a, b = torch.randn(RANK, 384), torch.randn(64, RANK)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    path = write_adapter(tmp_path / "adapter", {name + "A": a, name + "B": b}, config(target_modules=["embed_tokens"]))
    adapted = AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)
    stored = load_file(tiny_checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    expected = stored.double() + ALPHA / RANK * (b.double() @ a.double()).T
    np.testing.assert_allclose(adapted.read("model.embed_tokens.weight"), expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(adapted.read("lm_head.weight"), stored.numpy())
    assert not adapted.config.flag("tie_word_embeddings")


def test_modules_to_save_replace_the_models_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    head = torch.randn(384, 64)
    tensors = {
        **factors(),
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.norm.weight": torch.ones(64),
    }
    path = write_adapter(tmp_path / "adapter", tensors, config(modules_to_save=["lm_head", "norm"]))
    adapted = AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)
    np.testing.assert_array_equal(adapted.read("lm_head.weight"), head.numpy())
    np.testing.assert_array_equal(adapted.read("model.norm.weight"), np.ones(64, dtype=np.float32))
    assert not adapted.config.flag("tie_word_embeddings")


EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.mark.parametrize("with_head", [True, False])
def test_vocabulary_that_grew_in_training_is_the_models_and_stays_shared(
    with_head: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    table = torch.randn(386, 64)
    tensors = {**factors(), EMBEDDING: table} | ({HEAD: table.clone()} if with_head else {})
    path = write_adapter(tmp_path / "adapter", tensors, config())
    adapted = AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)
    assert "lm_head.weight" not in adapted.tensors
    assert adapted.tensors["model.embed_tokens.weight"].shape == (386, 64)
    assert (adapted.config.integer("vocab_size"), adapted.config.flag("tie_word_embeddings")) == (386, True)
    np.testing.assert_array_equal(adapted.read("model.embed_tokens.weight"), table.numpy())
    command = ["build", "-m", str(tiny_checkpoint), "--adapter", str(path), "-o", str(tmp_path / "p"), "-p", "fp32"]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "p")
    assert (manifest.model.vocab_size, manifest.model.tie_word_embeddings) == (386, True)
    assert manifest.fidelity is not None
    assert manifest.fidelity.kl_mean < 1e-5


def test_head_of_its_own_must_grow_with_the_embedding(untied_checkpoint: Path, tmp_path: Path) -> None:
    tensors = {EMBEDDING: torch.randn(386, 64), HEAD: torch.randn(386, 64)}
    settings = config(target_modules=[])
    path = write_adapter(tmp_path / "adapter", tensors, settings)
    adapted = AdaptedCheckpoint(HuggingFaceCheckpoint(untied_checkpoint), path)
    assert (adapted.config.integer("vocab_size"), adapted.tensors["lm_head.weight"].shape) == (386, (386, 64))
    alone = write_adapter(tmp_path / "alone", {EMBEDDING: tensors[EMBEDDING]}, settings)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[386, 64\], but must be \[384, 64\]"):
        AdaptedCheckpoint(HuggingFaceCheckpoint(untied_checkpoint), alone)


def test_adapter_fits_a_quantized_gguf(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    base = GgufCheckpoint(write_gguf(tmp_path / "x.gguf", HuggingFaceCheckpoint(tiny_checkpoint), kind=kind))
    tensors = factors()
    adapted = AdaptedCheckpoint(base, write_adapter(tmp_path / "adapter", tensors, config()))
    assert adapted.quantized(f"{Q}.weight") is None
    assert adapted.quantized("model.layers.0.self_attn.k_proj.weight") is not None
    expected = base.read(f"{Q}.weight") + ALPHA / RANK * product(tensors, Q).numpy()
    np.testing.assert_allclose(adapted.read(f"{Q}.weight"), expected, rtol=1e-5, atol=1e-5)


def test_command_merges_and_names_the_package_after_the_adapter(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "valve-helper", factors(), config())
    arguments = ["build", "-m", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "-p", "int4", "--json"]
    assert main([*arguments, "--adapter", str(adapter)]) == 0
    assert json.loads(capsys.readouterr().out)["package"] == "valve-helper-int4/1.0.0"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= manifest["provenance"]["source_sha256"].keys()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora: DoRA is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias: biases of the factors"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    path = write_adapter(tmp_path / "adapter", factors(), config(**changes))
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json: .*" + match):
        AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "match"),
    [
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": 1}, {}, WeightMismatchError, r"layers\.9"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": 1}, {}, UnsupportedModelError, "lora_magnitude_vector"),
        ({f"base_model.model.{Q}.lora_A.weight": None}, {}, WeightMismatchError, f"{Q}.weight has only factor B"),
        ({}, {"r": 8}, CheckpointError, r"factor A has shape \[4, 64\], but must be \[8, 64\]"),
        ({}, {"r": 0}, CheckpointError, "cannot have rank 0"),
        ({}, {"r": None}, CheckpointError, "'r' is missing"),
        ({}, {"target_modules": ["q_proj", "o_proj"]}, WeightMismatchError, "target_modules names o_proj"),
        ({}, {"modules_to_save": ["lm_head"]}, WeightMismatchError, "modules_to_save names lm_head"),
        ({"base_model.model.model.norm.weight": 63}, {}, CheckpointError, r"norm.weight has shape \[63\]"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(
    tiny_checkpoint: Path,
    tmp_path: Path,
    tensors: dict[str, int | None],
    settings: dict[str, object],
    error: type[LamplighterError],
    match: str,
) -> None:
    changed = {name: torch.ones(size or 1) for name, size in tensors.items()}
    kept = {name: values for name, values in (factors() | changed).items() if tensors.get(name, 1) is not None}
    path = write_adapter(tmp_path / "adapter", kept, config(**settings))
    with pytest.raises(error, match=match) as caught:
        AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)
    assert "adapter_" in caught.value.message


def test_directory_without_an_adapter_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no such file") as caught:
        AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), tmp_path)
    assert caught.value.hint == "give the directory of a PEFT adapter"


def test_pickled_adapter_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config()))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled \(adapter_model.bin\)"):
        AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), tmp_path)


def test_adapters_own_tokenizer_and_end_token_win(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", factors(), config())
    (path / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"})
    )
    adapted = AdaptedCheckpoint(HuggingFaceCheckpoint(tiny_checkpoint), path)
    assert adapted.tokenizer().chat_template == "{{ messages[0].content }}"
    assert adapted.generation_config.token_ids("eos_token_id") == (2, 0)
