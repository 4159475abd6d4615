"""How long the stages of a build take compared with each other, so that it can tell how much time is left in all.

The unit is what the checkpoint takes to read a token in float32. Work on weights that no token goes through is told in
that unit as well: both grow with the number of weights.
"""

from __future__ import annotations

from typing import Final

from lamplighter_builder.precision import PrecisionName, QuantizerName

_FLOAT_WEIGHTS: Final = 300.0
_WEIGHTS: Final[dict[QuantizerName, float]] = {"rtn": 300.0, "least-squares": 3300.0, "gptq": 300.0}

_LISTENING: Final = 6.0
_ROUNDING: Final = 2.0
"""For each token that is listened to: the run, its gradients, and what they add to Hessians."""

_WEIGHING: Final = 2000.0
_SPREADING: Final = 16.0
"""For each feature of the hidden states: a rounding error is spread over all features behind it."""

_RUN: Final = {"loading": 100.0, "cache scales": 1700.0, "self-test": 300.0}
_FIDELITY: Final = {
    "fidelity: answers": 2600.0,
    "fidelity: reference": 5000.0,
    "fidelity: package": 4000.0,
    "fidelity: level 1": 1500.0,
    "fidelity: int8 cache": 1500.0,
}
_FILES: Final = {"hashing": 50.0, "source hashes": 150.0}


def expected_course(
    precision: PrecisionName,
    quantizer: QuantizerName,
    *,
    hidden_size: int,
    heard_tokens: int,
    sized: bool,
    runs: bool,
    compares: bool,
) -> dict[str, float]:
    """Return the stages of a build in their order, with their shares of the time.

    Args:
        precision: Of the weights.
        quantizer: How matrices are rounded.
        hidden_size: Features of the hidden states.
        heard_tokens: Tokens that a calibration listens to, 0 without one.
        sized: True if formats are chosen for a bound.
        runs: True if the package is run for its self-tests.
        compares: True if it is compared with the checkpoint besides.
    """
    course = {}
    if heard_tokens:
        course["calibration: listening"] = _LISTENING * heard_tokens
        if sized:
            course["calibration: weighing"] = _WEIGHING
        course["calibration: rounding"] = (
            _ROUNDING * heard_tokens + _WEIGHTS["least-squares"] + _SPREADING * hidden_size
        )
    course["weights"] = _WEIGHTS[quantizer] if precision in ("int4", "int8") else _FLOAT_WEIGHTS
    if runs:
        course |= _RUN
        course |= _FIDELITY if compares else {}
    return course | _FILES
