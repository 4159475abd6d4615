"""Checkpoints that also see pictures: their language model becomes a package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamplighter_agent.package.manifest import decode_manifest
from lamplighter_builder.cli import main
from lamplighter_builder.parity import Reference, compare_logits
from lamplighter_builder.runner import Runner
from lamplighter_builder.sources import open_checkpoint
from support.families import write_family_checkpoint
from support.parity_depths import random_tokens

OLD = {"model.": "language_model.model.", "vision": "vision_tower.", "projector": "multi_modal_projector."}
NEW = {"model.": "model.language_model.", "vision": "model.vision_tower.", "projector": "model.multi_modal_projector."}


def with_pictures(text: Path, whole: Path, names: dict[str, str]) -> Path:
    """Write a checkpoint whose language model is a tiny Gemma 3, with names of tensors as they were or are."""
    whole.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (whole / name).write_bytes((text / name).read_bytes())
    config = json.loads((text / "config.json").read_text())
    ends = {"eos_token_id": [config.pop("eos_token_id"), 5]}
    # What Gemma's published configs leave out.
    for field in ("rms_norm_eps", "hidden_activation", "architectures"):
        del config[field]
    tree = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 4}, **ends}
    (whole / "config.json").write_text(json.dumps(tree))
    alone = load_file(text / "model.safetensors")
    tensors = {name.replace("model.", names["model."], 1): tensor for name, tensor in alone.items()}
    for part in ("vision", "projector"):
        tensors[f"{names[part]}weight"] = torch.zeros(4, 4)
    save_file(tensors, whole / "model.safetensors")
    return whole


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("text") / "gemma", "gemma3_text")


@pytest.mark.parametrize("names", [OLD, NEW], ids=["old", "new"])
def test_language_model_is_built_from_either_naming(names: dict[str, str], text: Path, tmp_path: Path) -> None:
    whole = with_pictures(text, tmp_path / "whole", names)
    assert main(["build", "-m", str(whole), "-o", str(tmp_path / "package"), "-p", "fp32"]) == 0
    manifest = decode_manifest((tmp_path / "package" / "manifest.json").read_bytes())
    assert (manifest.model.model_type, manifest.generation.eos_token_ids) == ("gemma3_text", (2, 5))
    assert manifest.fidelity is not None
    assert manifest.fidelity.kl_mean < 1e-6
    runner, prompt = Runner(tmp_path / "package" / "model.onnx"), random_tokens(1, 60)
    found = compare_logits(Reference.load(text).logits(prompt), runner.run(prompt, runner.empty_cache())[0])
    assert found.max_difference < 1e-3


@pytest.mark.parametrize("change", ["no text_config", "unknown tensor"])
def test_what_is_not_understood_is_named(
    change: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = with_pictures(text, tmp_path / "whole", OLD)
    if change == "no text_config":
        tree = json.loads((whole / "config.json").read_text())
        (whole / "config.json").write_text(json.dumps({**tree, "text_config": None}))
    else:
        tensors = load_file(whole / "model.safetensors")
        save_file({**tensors, "audio_tower.weight": torch.zeros(2)}, whole / "model.safetensors")
    assert main(["build", "-m", str(whole), "-o", str(tmp_path / "package"), "-p", "fp32"]) == 10
    wanted = "'text_config' is missing" if change == "no text_config" else "not used: audio_tower.weight"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("names", [OLD, NEW], ids=["old", "new"])
def test_an_adapter_of_the_whole_changes_its_language_model(names: dict[str, str], text: Path, tmp_path: Path) -> None:
    whole, module = with_pictures(text, tmp_path / "whole", names), "layers.0.self_attn.q_proj"
    weight = load_file(text / "model.safetensors")[f"model.{module}.weight"]
    a, b = torch.ones(2, weight.shape[1]), torch.full((weight.shape[0], 2), 0.5)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    ours, others = f"base_model.model.{names['model.']}{module}", f"base_model.model.{names['vision']}fc1"
    factors = {
        f"{one}.lora_{part}.weight": value.clone() for one in (ours, others) for part, value in (("A", a), ("B", b))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    found = open_checkpoint(str(whole), None, adapter).read(f"model.{module}.weight")
    torch.testing.assert_close(torch.from_numpy(found), weight + 3 * b @ a)
