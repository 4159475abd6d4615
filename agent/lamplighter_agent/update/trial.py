"""The judgement on a trial: pure rules over what a candidate worker measured."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from lamplighter_agent.package.manifest import Manifest, SelfTest
from lamplighter_agent.update.states import TrialLimits


class TrialMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate worker did with the manifest's self-tests, in their order.

    Attributes:
        self_test_tokens: Greedy tokens generated for each self-test prompt.
        load_s: Seconds until the engine was ready.
        first_token_s: Longest time from a prompt to its first token, or None if there was no self-test.
        prefill_tokens_per_s: Prompt speed, or None if it could not be measured.
        generated_tokens_per_s: Decode speed, or None if it could not be measured.
        peak_rss_bytes: Most memory that the worker process used, or None if the system does not tell.
    """

    self_test_tokens: tuple[tuple[int, ...], ...]
    load_s: float
    first_token_s: float | None = None
    prefill_tokens_per_s: float | None = None
    generated_tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None


class TrialVerdict(NamedTuple):
    """The judgement.

    Attributes:
        code: ``passed``, ``self_test_missing``, ``self_test_mismatch``, ``load_slow``, ``first_token_slow``,
            ``generation_slow`` or ``memory_high``; part of the protocol.
        message: One sentence with the values.
    """

    code: str
    message: str

    @property
    def passed(self) -> bool:
        """True if the package may be activated."""
        return self.code == "passed"


def judge_trial(manifest: Manifest, measurement: TrialMeasurement, *limits: TrialLimits) -> TrialVerdict:
    """Judge a trial: the self-tests first, then the limits of the manifest and of each operator.

    The first failure decides. A value that a limit needs but the trial could not measure fails that limit.
    """
    if len(measurement.self_test_tokens) != len(manifest.self_tests):
        return TrialVerdict(
            "self_test_missing",
            f"{len(measurement.self_test_tokens)} of {len(manifest.self_tests)} self-tests gave a result",
        )
    for number, (test, tokens) in enumerate(zip(manifest.self_tests, measurement.self_test_tokens, strict=True), 1):
        matching = _matching(test, tokens)
        if matching < test.min_matching_tokens:
            return TrialVerdict(
                "self_test_mismatch",
                f"self-test {number}: {matching} leading tokens are as expected, at least "
                f"{test.min_matching_tokens} of {len(test.expected_tokens)} must be",
            )
    for each in (manifest.trial_limits, *limits):
        verdict = _judge_limits(measurement, each)
        if not verdict.passed:
            return verdict
    return TrialVerdict("passed", f"{len(manifest.self_tests)} self-tests passed")


def _judge_limits(measurement: TrialMeasurement, limits: TrialLimits) -> TrialVerdict:
    for code, what, value, most in (
        ("load_slow", "s to load", measurement.load_s, limits.max_load_s),
        ("first_token_slow", "s to the first token", measurement.first_token_s, limits.max_first_token_s),
        ("memory_high", "bytes of memory", measurement.peak_rss_bytes, limits.max_peak_rss_bytes),
    ):
        if most is not None and (value is None or value > most):
            return TrialVerdict(code, f"{_figure(value)} {what}, at most {_figure(most)} allowed")
    least, speed = limits.min_generated_tokens_per_s, measurement.generated_tokens_per_s
    if least is not None and (speed is None or speed < least):
        return TrialVerdict("generation_slow", f"{_figure(speed)} tokens/s, at least {_figure(least)} asked for")
    return TrialVerdict("passed", "within the limits")


def _matching(test: SelfTest, tokens: tuple[int, ...]) -> int:
    count = 0
    for expected, actual in zip(test.expected_tokens, tokens, strict=False):
        if expected != actual:
            break
        count += 1
    return count


def _figure(value: float | None) -> str:
    if value is None:
        return "unknown"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
