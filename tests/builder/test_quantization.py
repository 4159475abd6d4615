"""The quantizers on arrays: what they promise about errors, bytes and text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.chat_format import ChatFormat, Role, RoleFormat
from lamplighter_builder.budget import Budget, fit_formats
from lamplighter_builder.generation import Answer, compare_answers, loop_begin
from lamplighter_builder.quantization.activations import activation_noise
from lamplighter_builder.quantization.allocation import PLAIN, Bound, Choice, allocate
from lamplighter_builder.quantization.blockwise import BlockFormat, FloatArray, QuantizedMatrix, storable_scales
from lamplighter_builder.quantization.calibration import read_texts, render_dialogue, shipped_texts, token_windows
from lamplighter_builder.quantization.fidelity import Tally
from lamplighter_builder.quantization.gptq import conditional_variance, quantize_gptq
from lamplighter_builder.quantization.least_squares import quantize_least_squares
from lamplighter_builder.quantization.rtn import quantize_rtn

FORMATS = [
    BlockFormat(bits=bits, block_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((4, 5, 6, 8), (32, 64), (True, False))
]


def random_weight(rows: int = 48, columns: int = 128) -> FloatArray:
    generator = np.random.default_rng(3)
    return (generator.standard_t(4, size=(rows, columns)) * 0.05).astype(np.float32)


def correlated_inputs(columns: int = 128) -> FloatArray:
    """Activations that lie near a subspace, with features of very different sizes."""
    generator = np.random.default_rng(4)
    mixed = generator.normal(size=(512, 24)) @ generator.normal(size=(24, columns))
    scales = generator.lognormal(size=columns)
    return ((mixed + 0.3 * generator.normal(size=(512, columns))) * scales).astype(np.float32)


def output_error(weight: FloatArray, matrix: QuantizedMatrix, x: FloatArray) -> float:
    return float(np.square(x @ (weight - matrix.dequantize()).T).mean())


@pytest.mark.parametrize("block_format", FORMATS)
def test_least_squares_loses_no_more_than_rounding(block_format: BlockFormat) -> None:
    weight = random_weight()
    importance = np.square(correlated_inputs()).mean(axis=0)
    plain = np.square(weight - quantize_rtn(weight, block_format).dequantize()) @ importance
    found = np.square(weight - quantize_least_squares(weight, block_format, importance).dequantize()) @ importance
    assert found.sum() <= plain.sum() * (0.9 if block_format.bits == 4 else 1.0)


@pytest.mark.parametrize("block_format", FORMATS)
def test_gptq_loses_less_of_the_output_than_least_squares(block_format: BlockFormat) -> None:
    weight, x = random_weight(), correlated_inputs()
    hessian = (x.T @ x / len(x)).astype(np.float32)
    plain = quantize_least_squares(weight, block_format, np.ascontiguousarray(hessian.diagonal()))
    assert output_error(weight, quantize_gptq(weight, block_format, hessian), x) < 0.5 * output_error(weight, plain, x)


def test_gptq_without_correlation_rounds_each_weight_by_itself() -> None:
    weight, block_format = random_weight(), FORMATS[0]
    found = quantize_gptq(weight, block_format, np.eye(128, dtype=np.float32))
    np.testing.assert_array_equal(found.codes, quantize_least_squares(weight, block_format).codes)


def test_gptq_survives_a_feature_that_is_never_active() -> None:
    x = correlated_inputs()
    x[:, 5] = 0
    found = quantize_gptq(random_weight(), FORMATS[0], x.T @ x)
    assert np.isfinite(found.scales).all()


@pytest.mark.parametrize("quantizer", [quantize_rtn, quantize_least_squares])
@pytest.mark.parametrize("block_format", FORMATS)
def test_scales_are_stored_without_loss(block_format: BlockFormat, quantizer: object) -> None:
    assert callable(quantizer)
    scales = quantizer(random_weight(), block_format).scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_a_storable_scale_is_the_next_one_that_is_not_smaller(values: list[float]) -> None:
    wanted = np.array(values, dtype=np.float32)
    stored = storable_scales(wanted)
    bounded = np.clip(np.abs(wanted), None, 65504)
    assert (np.abs(stored) >= bounded).all()
    below = np.nextafter(np.abs(stored).astype(np.float16), np.float16(0)).astype(np.float32)
    assert ((below < bounded) | (stored == 0)).all()


@pytest.mark.parametrize("quantizer", [quantize_least_squares, quantize_rtn])
def test_a_block_of_zeros_stays_zero(quantizer: object) -> None:
    assert callable(quantizer)
    weight = random_weight()
    weight[:, :32] = 0
    for block_format in FORMATS:
        assert not quantizer(weight, block_format).dequantize()[:, :32].any()


def test_conditional_variance_of_independent_features_is_their_own() -> None:
    diagonal = np.linspace(1, 9, 16, dtype=np.float32)
    np.testing.assert_allclose(conditional_variance(np.diag(diagonal)), diagonal + 0.01 * diagonal.mean(), rtol=1e-5)


def test_conditional_variance_is_small_where_others_make_up_for_it() -> None:
    x = correlated_inputs(32)
    hessian = (x.T @ x / len(x)).astype(np.float32)
    assert (conditional_variance(hessian) <= hessian.diagonal() * 1.02 + 0.011 * hessian.diagonal().mean()).all()


COARSE, FINE = BlockFormat(bits=4, block_size=64, symmetric=False), BlockFormat(bits=8, block_size=64, symmetric=True)
MATRICES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(st.integers(1, 50), st.floats(0.01, 1.0)).map(
        lambda pair: [Choice(COARSE, pair[0], pair[1]), Choice(FINE, 2 * pair[0], pair[1] / 256)]
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(choices=MATRICES, share=st.floats(0.0, 1.0))
def test_allocation_keeps_its_budget_and_spends_what_helps(choices: dict[str, list[Choice]], share: float) -> None:
    smallest = sum(options[0].nbytes for options in choices.values())
    budget = round(smallest * (1 + share))
    chosen = allocate(choices, Bound(budget))
    total = sum(choice.nbytes for choice in chosen.values())
    assert chosen.keys() == choices.keys()
    assert total <= budget
    # Nothing that would still fit was left coarse.
    left = [options[0].nbytes for name, options in choices.items() if chosen[name].format == COARSE]
    assert all(extra > budget - total for extra in left)


def test_allocation_spends_on_what_gains_most_a_byte() -> None:
    choices = {
        "dull": [Choice(COARSE, 100, 0.2), Choice(FINE, 200, 0.1)],
        "sharp": [Choice(COARSE, 100, 0.9), Choice(FINE, 200, 0.1)],
    }
    chosen = allocate(choices, Bound(300))
    assert (chosen["dull"].format, chosen["sharp"].format) == (COARSE, FINE)


def test_budget_below_four_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 100 bytes with 4 bits a weight, but the budget leaves 99"):
        allocate({"a": [Choice(COARSE, 100, 1.0)]}, Bound(99))


def test_bound_on_work_is_kept_where_bytes_would_allow_more() -> None:
    options = [Choice(COARSE, 100, 1.0, 100), Choice(FINE, 200, 0.1, 175)]
    chosen = allocate(dict.fromkeys("abcd", options), Bound(800, 560))
    assert sum(choice.work for choice in chosen.values()) == 550
    assert [choice.format for choice in chosen.values()].count(FINE) == 2


def test_small_sizes_keep_the_speed_of_plain_int4_and_larger_ones_do_not() -> None:
    options = [Choice(PLAIN, 1000, 1.0, 100), Choice(FINE, 2000, 0.1, 175)]
    choices = {f"{index}": options for index in range(10)}
    for nbytes, slowdown, fine in ((12_000, None, 1), (13_000, None, 3), (13_000, 0.1, 1), (12_000, 9.0, 2)):
        formats = fit_formats(choices, lambda chosen: _bytes_of(chosen, choices), Budget(nbytes, slowdown))
        assert list(formats.values()).count(FINE) == fine


def _bytes_of(chosen: Mapping[str, BlockFormat], choices: Mapping[str, Sequence[Choice]]) -> int:
    return sum(choice.nbytes for name, found in chosen.items() for choice in choices[name] if choice.format == found)


def test_rounding_of_activations_costs_more_in_larger_blocks() -> None:
    x = torch.from_numpy(correlated_inputs())
    weights = torch.ones(len(x))
    small, large = (activation_noise(x, weights, size) for size in (32, 128))
    rounded = x.view(-1, 4, 32)
    steps = rounded.abs().amax(2, keepdim=True) / 127
    expected = ((rounded / steps).round() * steps - rounded).square().flatten(1).mean(0)
    np.testing.assert_allclose(small, expected.numpy(), rtol=1e-4)
    assert large.sum() > small.sum()


@pytest.mark.parametrize(
    ("tokens", "begin"),
    [
        ([1, 2, 3, *[7] * 30], 4),
        ([1, 2, *[5, 6, 7] * 9], 5),
        (list(range(60)), None),
        ([*[7] * 40, 1, 2, 3], None),
        ([9] * 15, None),
    ],
)
def test_loop_begins_with_the_first_token_that_repeats(tokens: list[int], begin: int | None) -> None:
    assert loop_begin(tokens) == begin


def test_loop_counts_only_where_the_reference_would_leave_it() -> None:
    looping = Answer((1,), (1, 2, *[7] * 30))
    stays, leaves = list(looping.tokens), list(looping.tokens)
    leaves[20] = 8
    found = compare_answers([looping, looping, Answer((1,), (4, 5))], [stays, leaves, [4, 6]])
    assert (found.endless_loops, found.identical_answers) == (1, 1)
    assert found.agreement == pytest.approx(64 / 66)
    assert found.tokens_until_difference == pytest.approx((32 + 20 + 1) / 3)


def test_windows_are_whole_and_always_the_same() -> None:
    windows = token_windows(["a" * 2000], lambda text: range(len(text)), 1024)
    assert windows.shape == (4, 256)
    assert (np.diff(windows, axis=1) == 1).all()
    np.testing.assert_array_equal(windows, token_windows(["a" * 2000], lambda text: range(len(text)), 1024))


def test_too_little_calibration_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="makes 3 windows of 256 tokens, but 4 are needed"):
        token_windows(["a" * 1000], lambda text: range(len(text)), 4096)


def test_calibration_text_must_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Müller".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt: cannot be read as UTF-8"):
        read_texts([path])


def test_dialogue_is_rendered_in_the_models_format() -> None:
    roles: dict[Role, RoleFormat] = {
        "user": RoleFormat(prefix="<u>", suffix="\n"),
        "assistant": RoleFormat(prefix="<a>", suffix="\n"),
    }
    chat_format = ChatFormat(begin="", roles=roles, generation_prompt="<a>")
    rendered = render_dialogue("user: Hi\nassistant: Hello\nthere\n\nuser: Bye", chat_format)
    assert rendered == "<u>Hi\n<a>Hello\nthere\n<u>Bye\n"


def test_dialogue_that_the_format_does_not_allow_stays_text() -> None:
    chat_format = ChatFormat(begin="", roles={"user": RoleFormat(prefix="<u>", suffix="\n")}, generation_prompt="<a>")
    assert render_dialogue("system: Be brief.\nuser: Hi", chat_format) == "system: Be brief.\nuser: Hi"


def test_shipped_texts_are_enough_for_a_calibration() -> None:
    windows = token_windows(shipped_texts(None), lambda text: list(text.encode()), 1 << 20)
    assert len(windows) >= 100


def test_divergence_has_its_closed_form() -> None:
    tally = Tally()
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    others = np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])
    tally.add(np.log(probabilities).astype(np.float32), np.log(others).astype(np.float32), np.array([0]))
    found = tally.summary("reference")
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found.kl_mean == pytest.approx(expected / 2, rel=1e-5)
    assert (found.top1_agreement, found.tokens) == (0.5, 2)
    assert found.perplexity == pytest.approx(4, rel=1e-5)
    assert found.reference_perplexity == pytest.approx(2, rel=1e-5)
