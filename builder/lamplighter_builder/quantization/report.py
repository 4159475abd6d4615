"""The fidelity report of a build, as data. ``page`` shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import msgspec

from lamplighter_agent.package.fidelity import Fidelity


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """What became of a matrix.

    Attributes:
        path: Module path in the graph.
        bits: Bits a weight.
        block_size: Weights that share a scale.
        symmetric: True without zero points.
        nbytes: Bytes of codes, scales and zero points.
        error: Relative error of its output on the calibration text, root mean square; tokens weighted by their
            influence on the model's output.
    """

    path: str
    bits: int
    block_size: int
    symmetric: bool
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A choice of formats that was not taken.

    Attributes:
        nbytes: Bytes of all matrices.
        expected_kl: Estimate of the divergence, nats a token.
        name: The format that all matrices have; empty where each has the one that gains most.
    """

    nbytes: int
    expected_kl: float
    name: str = ""


@dataclass(slots=True)
class Report:
    """Everything that a build tells about its fidelity."""

    package: str
    model_bytes: int
    fidelity: Fidelity
    matrices: list[MatrixReport] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        facts = {
            "package": self.package,
            "model_bytes": self.model_bytes,
            "fidelity": msgspec.to_builtins(self.fidelity),
            "warnings": self.warnings,
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
        }
        return json.dumps(facts, indent=1, ensure_ascii=False).encode()


def comparisons(fidelity: Fidelity) -> dict[str, str]:
    """Return sentences about what was compared besides predictions on the text, by what each is about."""
    found = {}
    if (answers := fidelity.generation) is not None:
        found["greedy answers"] = (
            f"{answers.agreement:.1%} of {answers.tokens} tokens as the checkpoint would choose, "
            f"{answers.identical_answers} of {answers.prompts} answers the same throughout, "
            f"{answers.tokens_until_difference:.0f} tokens until the first difference on average, "
            f"{answers.endless_loops} in an endless loop of the package's own"
        )
    if (level := fidelity.accuracy_level) is not None:
        found["accuracy level 4 instead of 1"] = (
            f"{level.flipped:.1%} of {level.tokens} most likely tokens change, "
            f"KL {level.kl_mean:.4f} instead of {level.level_1_kl_mean:.4f}"
        )
    if (cache := fidelity.int8_cache) is not None:
        found["int8 cache instead of float32"] = (
            f"{cache.flipped:.1%} of {cache.tokens} most likely tokens change, "
            f"KL {cache.kl_mean:.4f} instead of {cache.float32_kl_mean:.4f}"
        )
    return found
