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
