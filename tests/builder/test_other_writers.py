"""Checkpoints as other tools and other times wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import CheckpointError, WeightMismatchError
from lamplighter_agent.package.manifest import read_manifest
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.cli import main
from lamplighter_builder.parity import Reference, compare_logits
from lamplighter_builder.runner import Runner
from support.families import write_family_checkpoint
from support.parity_depths import random_tokens
from support.tiny_model import build_tiny_package, tiny_tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, whose head is tied, to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def change_weights(checkpoint: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(checkpoint / "model.safetensors")), checkpoint / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | changes))


def largest_difference(checkpoint: Path, output: Path) -> float:
    """Build in float32 and return how far its logits are from those of transformers."""
    runner = Runner(build_tiny_package(checkpoint, output, "fp32") / "model.onnx")
    prompt = random_tokens(1, 20)
    logits, _ = runner.run(prompt, runner.empty_cache())
    return compare_logits(Reference.load(checkpoint).logits(prompt), logits).max_difference


def test_a_decoder_saved_without_its_head_is_built(copy: Path, tmp_path: Path) -> None:
    change_weights(copy, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    assert "embed_tokens.weight" in load_file(copy / "model.safetensors")
    assert largest_difference(copy, tmp_path / "package") < 1e-3


def test_a_stored_head_that_is_not_the_embedding_is_used_whatever_the_config_says(copy: Path, tmp_path: Path) -> None:
    change_weights(
        copy, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}
    )
    assert largest_difference(copy, tmp_path / "package") < 1e-3
    assert read_manifest(tmp_path / "package").model.tie_word_embeddings is False


def test_a_missing_head_says_how_a_tied_one_is_declared(copy: Path, tmp_path: Path) -> None:
    change_json(copy / "config.json", tie_word_embeddings=False)
    with pytest.raises(WeightMismatchError, match=r"missing: lm_head\.weight") as caught:
        build_tiny_package(copy, tmp_path / "package")
    assert "tie_word_embeddings true" in str(caught.value.hint)


def test_weights_quantized_by_another_tool_are_named(copy: Path, tmp_path: Path) -> None:
    change_json(copy / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    change_weights(
        copy, lambda tensors: {name.replace(".weight", ".qweight"): value for name, value in tensors.items()}
    )
    with pytest.raises(WeightMismatchError) as caught:
        build_tiny_package(copy, tmp_path / "package")
    assert "quantized (awq)" in str(caught.value.hint)


def test_added_tokens_without_a_row_of_the_embedding_are_left_out(copy: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image_soft_token>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    package = build_tiny_package(copy, tmp_path / "package")
    found = Tokenizer.from_file(str(package / "tokenizer.json"))
    assert found.get_vocab_size() == rows
    assert found.encode("The lamp<|im_end|>").ids == tiny_tokenizer().encode("The lamp<|im_end|>").ids


def test_special_tokens_are_also_read_from_their_map(copy: Path) -> None:
    change_json(copy / "tokenizer_config.json", bos_token=None)
    change_json(copy / "special_tokens_map.json", bos_token={"content": "<|im_start|>"}, eos_token="no")
    special = HuggingFaceCheckpoint(copy).tokenizer().special_tokens
    assert (special["bos_token"], special["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_the_tokenizer_names_the_end_where_no_config_does(copy: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        change_json(copy / name, eos_token_id=None, pad_token_id=-1)
    generation = read_manifest(build_tiny_package(copy, tmp_path / "package")).generation
    assert (generation.eos_token_ids, generation.pad_token_id) == ((2,), None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eos_token_id": [2, 9999]}, "eos_token_id is 9999, but the embedding has 384 rows"),
        ({"top_p": 1.5}, "top_p is 1.5, but must be from 0 to 1"),
        ({"temperature": -1}, "temperature is -1, but must be from 0 to inf"),
        ({"min_p": 1.0}, "min_p is 1, but must be from 0 to"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but must be above zero"),
    ],
)
def test_sampling_defaults_out_of_range_are_refused(
    copy: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    change_json(copy / "generation_config.json", **changes)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {words}"):
        build_tiny_package(copy, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_sampling_defaults_of_other_spellings_mean_all_or_the_likeliest_token(copy: Path, tmp_path: Path) -> None:
    change_json(copy / "generation_config.json", do_sample=True, top_k=-1, top_p=0)
    generation = read_manifest(build_tiny_package(copy, tmp_path / "package")).generation
    assert generation.top_k == 0
    assert 0 < generation.top_p < 1e-3


def test_min_p_and_typical_p_are_defaults_of_the_package(copy: Path, tmp_path: Path) -> None:
    change_json(copy / "generation_config.json", do_sample=True, min_p=0.05, typical_p=0.9)
    generation = read_manifest(build_tiny_package(copy, tmp_path / "package")).generation
    assert (generation.min_p, generation.typical_p) == (0.05, 0.9)
    params = GenerationParams(typical_p=1.0).with_defaults(generation)
    assert (params.min_p, params.typical_p) == (0.05, 1.0)


def test_sampling_that_a_package_cannot_keep_is_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(copy / "generation_config.json", no_repeat_ngram_size=3, num_beams=1, eta_cutoff=0.0, min_length=None)
    command = ["build", "-m", str(copy), "-o", str(tmp_path / "package"), "-p", "fp32"]
    assert main(command) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "generation_config.json: no_repeat_ngram_size 3 is not kept" in warnings[0]


@pytest.mark.parametrize("early_name", ["su", "yarn"])
def test_early_longrope_configs_are_compared_with_the_checkpoint(early_name: str, tmp_path: Path) -> None:
    checkpoint = write_family_checkpoint(tmp_path / "phi3", "phi3-longrope")
    config = json.loads((checkpoint / "config.json").read_text())
    rope = config.pop("rope_parameters")
    factors = {key: rope[key] for key in ("short_factor", "long_factor")}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": early_name, **factors}}
    del config["pad_token_id"]  # transformers' own default is beyond this vocabulary
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["build", "-m", str(checkpoint), "-o", str(tmp_path / "package"), "-p", "fp32"]) == 0
    fidelity = read_manifest(tmp_path / "package").fidelity
    assert fidelity is not None
    assert fidelity.kl_mean < 1e-6


def test_what_transformers_cannot_run_is_said_before_the_work(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise KeyError("no such field")

    monkeypatch.setattr("transformers.AutoConfig.for_model", refuse)
    arguments = ["build", "-m", str(copy), "-o", str(tmp_path / "package"), "-p", "fp32"]
    assert main(arguments) == 10
    said = capsys.readouterr().err
    assert "transformers cannot run it for a comparison: 'no such field'" in said
    assert "weights:" not in said
    assert main([*arguments, "--no-fidelity"]) == 0
