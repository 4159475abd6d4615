from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.parity import Parity, Reference, compare_logits
from lamplighter_builder.precision import INT4_FORMAT, INT8_FORMAT, PrecisionName
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.quantization.blockwise import BlockFormat
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.runner import IntArray, Runner
from support.families import FAMILIES, load_reference, write_family_checkpoint
from support.parity_depths import DEPTHS, VOCAB, random_tokens
from support.tiny_model import build_tiny_package

TOLERANCE = 1e-3


def assert_close(parity: Parity) -> None:
    assert parity.max_difference < TOLERANCE
    assert parity.top1_agreement == 1.0


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("parity") / family, family)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    torch.set_num_threads(2)
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def runner(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    package = build_tiny_package(checkpoint, tmp_path_factory.mktemp("fp32") / "package", "fp32")
    return Runner(package / "model.onnx")


@pytest.mark.parametrize("depth", DEPTHS)
def test_logits_are_those_of_transformers(depth: str, reference: Reference, runner: Runner) -> None:
    assert_close(DEPTHS[depth](reference, runner))


def test_greedy_tokens_are_those_of_transformers(reference: Reference, runner: Runner) -> None:
    prompt = random_tokens(1, 20)[0].tolist()
    assert [chosen.token for chosen in runner.greedy(prompt, 40)] == reference.greedy(prompt, 40)


def test_logits_start_leaves_out_the_rows_before_it(reference: Reference, runner: Runner) -> None:
    prompt = random_tokens(1, 30)
    found, _ = runner.run(prompt, runner.empty_cache(), logits_start=27)
    assert found.shape == (1, 3, VOCAB)
    assert_close(compare_logits(reference.logits(prompt)[:, 27:], found))


@pytest.mark.parametrize(("precision", "block_format"), [("int4", INT4_FORMAT), ("int8", INT8_FORMAT)])
def test_quantized_package_equals_its_own_dequantized_weights(
    family: str, checkpoint: Path, precision: PrecisionName, block_format: BlockFormat, tmp_path: Path
) -> None:
    package = build_tiny_package(checkpoint, tmp_path / "package", precision)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The experts of a layer are one tensor; a router stays as it is.
            if parameter.dim() > 1 and "router" not in name:
                for matrix in parameter.reshape(-1, *parameter.shape[-2:]):
                    matrix.copy_(torch.from_numpy(quantize_rtn(matrix.numpy(), block_format).dequantize()))
    reference, prompt = Reference(model), random_tokens(1, 60)
    # Accuracy level 4 quantizes activations to int8, with steps of 1/127 of the largest in each block of 32. These
    # models' wide random weights carry that into the logits as some hundredths of a nat.
    # Where a router decides, a small difference sends some tokens to other experts.
    limit = 0.3 if family == "phimoe" else 0.1
    assert compare_logits(reference.logits(prompt), run_whole(package, prompt)).kl_mean < limit
    if (family, precision) == ("phimoe", "int8"):
        return  # QMoE has no kernel for 8-bit experts that leaves activations as they are.
    # Accuracy level 1 leaves the rounding of the weights as the only one.
    compute_in_float(package / "model.onnx")
    assert_close(compare_logits(reference.logits(prompt), run_whole(package, prompt)))


def test_differences_are_measured() -> None:
    expected = np.array([[[0.0, 1.0], [2.0, 0.0]]], dtype=np.float32)
    found = compare_logits(expected, expected[:, :, ::-1].copy())
    assert (found.tokens, found.max_difference, found.top1_agreement) == (2, 2.0, 0.0)
    assert compare_logits(expected, expected) == Parity(2, 0.0, 0.0, 1.0)


@pytest.mark.smollm2
def test_real_weights_give_the_same_200_greedy_tokens(
    smollm2_gguf: Path, smollm2_model: PreTrainedModel, tmp_path: Path
) -> None:
    options = BuildOptions(output=tmp_path / "package", precision="fp32", name="smollm2", version="1")
    manifest = build_package(GgufCheckpoint(smollm2_gguf), options, SilentProgress())
    prompt = list(manifest.self_tests[0].prompt_tokens)
    greedy = [chosen.token for chosen in Runner(tmp_path / "package" / "model.onnx").greedy(prompt, 200)]
    # One pass over the result shows each step's choice: it is transformers' own greedy text if all of them agree.
    logits = Reference(smollm2_model).logits(np.array([prompt + greedy[:-1]], dtype=np.int64))
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == greedy


def run_whole(package: Path, prompt: IntArray) -> FloatArray:
    runner = Runner(package / "model.onnx")
    return runner.run(prompt, runner.empty_cache())[0]


def compute_in_float(path: Path) -> None:
    """Set MatMulNBits to compute with float32 activations, which leaves the weights' rounding as the only one."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    path.write_bytes(model.SerializeToString())
