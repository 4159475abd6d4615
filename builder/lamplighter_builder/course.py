"""How long the stages of a build take compared with each other, so that it can tell how much time is left in all."""

from __future__ import annotations

from typing import Final

from lamplighter_builder.precision import PrecisionName, QuantizerName

_FLOAT_WEIGHTS: Final = 8.0
_WEIGHTS: Final[dict[QuantizerName, float]] = {"rtn": 15.0, "least-squares": 45.0, "gptq": 8.0}
_CALIBRATION: Final = {"calibration: listening": 60.0, "calibration: weighing": 30.0, "calibration: rounding": 90.0}
_RUN: Final = {"loading": 1.0, "cache scales": 8.0, "self-test": 3.0}
_FIDELITY: Final = {
    "fidelity: answers": 10.0,
    "fidelity: reference": 25.0,
    "fidelity: package": 30.0,
    "fidelity: level 1": 10.0,
}
_FILES: Final = {"hashing": 1.0, "source hashes": 1.0}
"""Shares of a build of Phi-3.5-mini's shape to INT4 on two cores; calibration comes on top of them."""


def expected_course(
    precision: PrecisionName, quantizer: QuantizerName, *, sized: bool, runs: bool, compares: bool
) -> dict[str, float]:
    """Return the stages of a build with their shares of the time.

    Args:
        precision: Of the weights.
        quantizer: How matrices are rounded.
        sized: True if formats are chosen for a bound.
        runs: True if the package is run for its self-tests.
        compares: True if it is compared with the checkpoint besides.
    """
    quantizes = precision in ("int4", "int8")
    course = {"weights": _WEIGHTS[quantizer] if quantizes else _FLOAT_WEIGHTS}
    if quantizer == "gptq":
        course |= {title: share for title, share in _CALIBRATION.items() if sized or "weighing" not in title}
    if runs:
        course |= _RUN
        course |= _FIDELITY if compares else {}
    return course | _FILES
