"""Calibrated builds: the streamed model is the model, a size is kept, and what is measured is told."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_agent.package.manifest import Manifest, decode_manifest, read_manifest
from lamplighter_builder.cache_scales import calibrate_cache
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.cli import main
from lamplighter_builder.drafts import Drafts
from lamplighter_builder.evaluation import Reference
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.precision import PrecisionName, choose_target, uniform_scheme
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.quantization.calibration import held_out_texts, mixed_windows, shipped_texts
from lamplighter_builder.reference_tensors import read_reference_tensor
from lamplighter_builder.runner import Runner
from lamplighter_builder.streamed_model import StreamedModel
from lamplighter_builder.weights import write_weights
from support.families import FAMILIES, write_family_checkpoint
from support.tiny_model import TinyShape, write_tiny_checkpoint

STREAMED = sorted(FAMILIES)


def manifest_of(package: Path) -> Manifest:
    return decode_manifest((package / "manifest.json").read_bytes())


def build(checkpoint: Path, output: Path, *options: str) -> int:
    return main(["build", "-m", str(checkpoint), "-o", str(output), "-p", "int4", "--licence", "MIT", *options])


def model_bytes(package: Path) -> int:
    return sum((package / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def _keep_gradient(path: str, kept: dict[str, torch.Tensor]) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda found: kept.__setitem__(path, found.flatten(0, -2)))  # type: ignore[no-untyped-call]

    return hook


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_model_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    checkpoint = write_family_checkpoint(tmp_path / "checkpoint", family)
    streamed = StreamedModel(HuggingFaceCheckpoint(checkpoint))
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(3, 384, (2, 40), generator=torch.Generator().manual_seed(5))

    recording = streamed.record(streamed.embedding(tokens))
    states = recording.states.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(streamed.logits(states).logsumexp(-1).sum(), states)
    seen: dict[str, torch.Tensor] = {}
    streamed.backward(recording, gradient, lambda path, _x, found: seen.__setitem__(path, found), lambda: None)

    expected: dict[str, torch.Tensor] = {}
    for path in seen:
        whole.get_submodule(path).register_forward_hook(_keep_gradient(path, expected))
    logits = whole(inputs_embeds=whole.get_input_embeddings()(tokens).requires_grad_(True)).logits
    logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(streamed.logits(states), logits, rtol=1e-3, atol=1e-3)
    assert seen.keys() == expected.keys()
    assert len(seen) >= 2 * 4
    for path, found in seen.items():
        torch.testing.assert_close(found, expected[path], rtol=2e-3, atol=2e-3 * float(expected[path].abs().max()))


def test_tensor_that_nothing_can_be_made_of_is_named(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(write_family_checkpoint(tmp_path / "checkpoint", "phimoe"))
    with pytest.raises(UnsupportedModelError, match=r"looks for a tensor model\.layers\.7\.mlp\.router"):
        read_reference_tensor(checkpoint, "model.layers.7.mlp.router.weight")


def test_experts_are_compared_but_cannot_be_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_family_checkpoint(tmp_path / "checkpoint", "phimoe")
    config = json.loads((checkpoint / "config.json").read_text())
    # Beyond the text of the comparison: transformers never takes the long factors of this model (5.23).
    config["original_max_position_embeddings"] = config["rope_parameters"]["original_max_position_embeddings"] = 300
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert build(checkpoint, tmp_path / "package", "-p", "fp32") == 0
    fidelity = manifest_of(tmp_path / "package").fidelity
    assert fidelity is not None
    assert (fidelity.kl_mean < 1e-6, fidelity.top1_agreement) == (True, 1.0)
    assert build(checkpoint, tmp_path / "calibrated", "-q", "gptq") == 10
    assert "experts.0.w1.weight cannot be listened to" in capsys.readouterr().err
    assert not (tmp_path / "calibrated").exists()


class Watched:
    """A checkpoint that knows how many of its experts' matrices are in memory at once."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint) -> None:
        self.path, self._checkpoint = checkpoint.path, checkpoint
        self._alive: list[weakref.ref[FloatArray]] = []
        self.most = 0

    def read(self, name: str) -> FloatArray:
        values = self._checkpoint.read(name)
        if ".experts." in name:
            self._alive = [one for one in self._alive if one() is not None] + [weakref.ref(values)]
            self.most = max(self.most, len(self._alive))
        return values

    def quantized(self, _name: str) -> QuantizedMatrix | None:
        return None


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_experts_are_read_one_by_one(precision: PrecisionName, tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(write_family_checkpoint(tmp_path / "checkpoint", "phimoe"))
    target = choose_target(precision, "cpu")
    _, graph = Drafts(checkpoint, target).make(uniform_scheme(precision, "cpu", "rtn"))
    watched = Watched(checkpoint)
    write_weights(graph, watched, target, tmp_path / "weights", SilentProgress())
    # A layer has six experts of three matrices. One may still be held while the next one is read.
    assert 1 <= watched.most <= 2


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("calibrated") / "package"
    assert build(tiny_checkpoint, package, "--target-mb", "0.2") == 0
    return package


def test_size_is_kept_and_used(calibrated: Path) -> None:
    # The matrices of a tiny model are large steps: one more in eight bits would be too much.
    assert 180_000 < model_bytes(calibrated) <= 200_000
    options = manifest_of(calibrated).provenance.options
    assert (options["quantizer"], options["target_bytes"]) == ("gptq", 200_000)


def test_formats_are_mixed_and_told(calibrated: Path) -> None:
    groups = {(group.name, group.bits) for group in manifest_of(calibrated).precision.groups}
    found = {bits for _, bits in groups} - {32}
    assert len(found) > 1
    report = json.loads((calibrated / "fidelity.json").read_text())
    assert {matrix["bits"] for matrix in report["matrices"]} == found
    assert report["fidelity"]["kl_mean"] == manifest_of(calibrated).fidelity.kl_mean  # type: ignore[union-attr]
    mixed = [point for point in report["alternatives"] if not point["name"]]
    sizes = [point["nbytes"] for point in mixed]
    assert sizes == sorted(sizes)
    costs = [point["expected_kl"] for point in mixed]
    assert costs == sorted(costs, reverse=True)
    alike = {point["name"] for point in report["alternatives"]} - {""}
    assert {"4 bits in blocks of 32", "8 bits in blocks of 32"} <= alike


def test_greedy_answers_and_accuracy_levels_are_compared(calibrated: Path) -> None:
    fidelity = manifest_of(calibrated).fidelity
    assert fidelity is not None
    assert fidelity.generation is not None
    assert fidelity.accuracy_level is not None
    assert fidelity.generation.prompts == 8
    assert 0 < fidelity.generation.agreement <= 1
    # Random weights choose among near-ties, yet exact activations bring the package nearer to its checkpoint.
    assert fidelity.accuracy_level.level_1_kl_mean < fidelity.accuracy_level.kl_mean
    assert json.loads((calibrated / "fidelity.json").read_text())["fidelity"]["generation"]["prompts"] == 8


def test_listening_brings_a_package_closer_than_rounding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for quantizer in ("rtn", "gptq"):
        assert build(tiny_checkpoint, tmp_path / quantizer, "-q", quantizer) == 0
        fidelity = manifest_of(tmp_path / quantizer).fidelity
        assert fidelity is not None
        found[quantizer] = fidelity.kl_mean
    assert model_bytes(tmp_path / "gptq") == model_bytes(tmp_path / "rtn")
    assert found["gptq"] < found["rtn"]


def test_same_build_gives_the_same_bytes(calibrated: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert build(tiny_checkpoint, tmp_path / "again", "--target-mb", "0.2") == 0
    assert (tmp_path / "again" / "model.onnx.data").read_bytes() == (calibrated / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("context", [40, 128])
def test_context_shorter_than_the_texts_to_compare_on(tmp_path: Path, context: int) -> None:
    source = write_tiny_checkpoint(tmp_path / "short", TinyShape(max_position_embeddings=context))
    assert build(source, tmp_path / "package") == 0
    fidelity = read_manifest(tmp_path / "package").fidelity
    assert fidelity is not None
    assert fidelity.generation is not None
    assert fidelity.tokens % context == 0  # whole windows of the context
    assert fidelity.generation.prompts == 8


def test_package_that_diverges_too_much_is_not_built(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tiny_checkpoint, tmp_path / "package", "--max-kl", "0") == 12
    assert "but --max-kl allows 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "/missing.txt"), "/missing.txt: cannot be read: No such file"),
        (("--target-mb", "0.05"), "with 4 bits a weight, but the budget is 0.05 MB"),
        (("--target-mb", "1", "--bits-per-weight", "5"), "name the same bound"),
        (("--max-slowdown", "10"), "needs a size to spend"),
        (("-q", "rtn", "--target-mb", "1"), "neither listens to calibration text nor keeps to a size"),
        (("-e", "cuda", "--target-mb", "1"), "has one format for all matrices"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], message: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tiny_checkpoint, tmp_path / "package", *options) == 3
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_own_calibration_text_that_is_too_short(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too little.")
    assert build(tiny_checkpoint, tmp_path / "package", "--calibration", str(text)) == 3
    assert "give more text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "number"),
    [
        *product(("--target-mb", "--bits-per-weight", "--max-slowdown"), ("nan", "-1", "0", "inf", "much")),
        *product(("--max-kl",), ("nan", "-1", "inf", "much")),
    ],
)
def test_bounds_are_numbers_that_bound(option: str, number: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        build(tmp_path, tmp_path / "package", option, number)
    assert caught.value.code == 2


def test_text_that_fidelity_is_reported_on_is_no_calibration_text(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "leak.txt"
    text.write_text("Something else.\n" * 400 + "\n".join(held_out_texts()))
    assert build(tiny_checkpoint, tmp_path / "package", "--calibration", str(text)) == 3
    assert "leak.txt: holds text that builds report their fidelity on" in capsys.readouterr().err


def test_scales_of_an_8_bit_cache_know_texts_of_every_kind(tiny_int4: Path) -> None:
    own = manifest_of(tiny_int4)
    runner, tokenizer = Runner(tiny_int4 / "model.onnx"), Tokenizer.from_file(str(tiny_int4 / "tokenizer.json"))
    shipped = mixed_windows(
        shipped_texts(own.chat_format), lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    )
    page, both = (calibrate_cache(runner, tokenizer, own.model, windows) for windows in (shipped[:0], shipped))
    assert own.cache_scales == both != page
    for before, after in zip(page.key + page.value, both.key + both.value, strict=True):
        assert (np.frombuffer(after, "<f4") >= np.frombuffer(before, "<f4")).all()


def test_scales_of_an_8_bit_cache_know_the_users_own_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for number, text in enumerate(("abc def " * 3000, "uvw xyz " * 3000)):
        (tmp_path / "own.txt").write_text(text)
        package = tmp_path / str(number)
        assert build(tiny_checkpoint, package, "--no-fidelity", "--calibration", str(tmp_path / "own.txt")) == 0
        found.append(manifest_of(package).cache_scales)
    assert found[0] != found[1]


def test_windows_are_compared_without_answers(tiny_int4: Path, tiny_checkpoint: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(tiny_checkpoint)
    windows = np.random.default_rng(4).integers(3, 300, (2, 40))
    reference = Reference(checkpoint, windows, (), SilentProgress())
    tally = reference.tally(Runner(tiny_int4 / "model.onnx"), SilentProgress())
    assert (tally.tokens, reference.choices) == (80, [])


def test_packages_are_compared_side_by_side(
    calibrated: Path, tiny_int4: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(calibrated), str(tiny_int4), "--reference", str(tiny_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[str(calibrated)]["kl_mean"] < found[str(tiny_int4)]["kl_mean"]


def test_model_folder_of_another_file_name_is_compared(
    tiny_int4: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_int4, folder)
    (folder / "manifest.json").unlink()
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    arguments = ["evaluate", str(folder), str(tiny_int4), "--reference", str(tiny_checkpoint)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Only a manifest has scales for another cache.
    assert found[str(tiny_int4)].pop("int8_cache")["tokens"] > 0
    assert found[str(folder)] | {"int8_cache": None} == found[str(tiny_int4)] | {"int8_cache": None}
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert f"{folder}: accuracy level 4 instead of 1" in told
    assert f"{tiny_int4}: int8 cache instead of float32" in told
    assert f"{folder}: int8 cache" not in told


def test_reference_of_another_vocabulary_is_refused(
    tiny_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_family_checkpoint(tmp_path / "other", "gemma")
    (other / "tokenizer.json").write_bytes(other_tokenizer())
    assert main(["evaluate", str(tiny_int4), "--reference", str(other)]) == 10
    assert "has another vocabulary than the reference" in capsys.readouterr().err


def test_same_package_twice_is_refused(tiny_int4: Path, tiny_checkpoint: Path) -> None:
    assert main(["evaluate", str(tiny_int4), str(tiny_int4), "--reference", str(tiny_checkpoint)]) == 3


def other_tokenizer() -> bytes:
    """Return a tokenizer whose tokens are single letters."""
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return bytes(tokenizer.to_str(), "utf-8")
