"""The fidelity report of a build, as data and as a page of its own that needs nothing from anywhere else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

import msgspec

from lamplighter_agent.package.fidelity import Fidelity

_WIDTH: Final = 760
_HEIGHT: Final = 260
_MARGIN: Final = 56
_COLOURS: Final = ("#3366aa", "#cc6633", "#228855", "#aa3377", "#887722", "#555555")


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
    """A size that was not chosen, or the one that was.

    Attributes:
        nbytes: Bytes of all matrices.
        expected_kl: Estimate of the divergence, nats a token.
    """

    nbytes: int
    expected_kl: float


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

    def to_html(self) -> bytes:
        """Return the report as a page."""
        facts = {
            "mean KL divergence": f"{self.fidelity.kl_mean:.4f} nats a token",
            "median, 99th percentile": f"{self.fidelity.kl_median:.4f}, {self.fidelity.kl_p99:.4f}",
            "same most likely token": f"{self.fidelity.top1_agreement:.1%}",
            "perplexity": f"{self.fidelity.perplexity:.2f} (reference {self.fidelity.reference_perplexity:.2f})",
            "compared with": f"{self.fidelity.reference}, on {self.fidelity.tokens} tokens",
            "model and weights": f"{self.model_bytes / 1e6:.1f} MB",
        }
        rows = "".join(f"<tr><th>{html.escape(key)}<td>{html.escape(value)}" for key, value in facts.items())
        parts = [f"<table>{rows}</table>", *(f"<p>Note: {html.escape(text)}" for text in self.warnings)]
        if self.alternatives:
            points = [(point.nbytes / 1e6, point.expected_kl) for point in self.alternatives]
            parts += ["<h2>Expected divergence by size of the matrices</h2>", _curve(points, "MB", "nats a token")]
        if self.matrices:
            parts += ["<h2>Relative error of each matrix's output</h2>", _errors(self.matrices), _table(self.matrices)]
        title = f"Fidelity of {html.escape(self.package)}"
        style = (
            "body{font:15px sans-serif;max-width:52em;margin:2em auto;padding:0 1em}th{text-align:left;"
            "padding-right:2em;font-weight:normal;color:#555}td{font-variant-numeric:tabular-nums;padding-right:1em}"
        )
        page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        return (page + "".join(parts)).encode()


def _table(matrices: Sequence[MatrixReport]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(matrix.path)}<td>{matrix.bits} bits<td>blocks of {matrix.block_size}"
        f"<td>{'symmetric' if matrix.symmetric else 'zero points'}"
        f"<td>{matrix.nbytes / 1e6:.2f} MB<td>{matrix.error:.4f}"
        for matrix in matrices
    )
    return f"<details><summary>All matrices</summary><table>{rows}</table></details>"


def _errors(matrices: Sequence[MatrixReport]) -> str:
    """Plot the error of each matrix over the order of the graph, a colour for each kind; filled: 4 bits."""
    kinds = list(dict.fromkeys(matrix.path.rsplit(".", 1)[-1] for matrix in matrices))
    highest = max(matrix.error for matrix in matrices) or 1.0
    dots = []
    for index, matrix in enumerate(matrices):
        colour = _COLOURS[kinds.index(matrix.path.rsplit(".", 1)[-1]) % len(_COLOURS)]
        x, y = _place(index / max(len(matrices) - 1, 1), matrix.error / highest)
        fill = colour if matrix.bits == 4 else "white"
        title = html.escape(f"{matrix.path}: {matrix.error:.4f}, {matrix.bits} bits")
        dots.append(f'<circle cx="{x}" cy="{y}" r="4" stroke="{colour}" fill="{fill}"><title>{title}</title></circle>')
    legend = " ".join(
        f'<span style="color:{_COLOURS[index % len(_COLOURS)]}">&#9679; {html.escape(kind)}</span>'
        for index, kind in enumerate(kinds)
    )
    return f"{_svg(dots, ('first layer', 'last layer'), highest)}<p>{legend}; hollow: 8 bits"


def _curve(points: Sequence[tuple[float, float]], unit: str, height_unit: str) -> str:
    """Plot a line through points; a dot marks each."""
    lowest, widest = min(x for x, _ in points), max(x for x, _ in points)
    highest = max(y for _, y in points) or 1.0
    places = [_place((x - lowest) / (widest - lowest or 1.0), y / highest) for x, y in points]
    line = " ".join(f"{x},{y}" for x, y in places)
    marks = [f'<polyline points="{line}" fill="none" stroke="{_COLOURS[0]}"/>']
    for (x, y), (size, value) in zip(places, points, strict=True):
        title = f"{size:.1f} {unit}: {value:.4f} {height_unit}"
        marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{_COLOURS[0]}"><title>{title}</title></circle>')
    return _svg(marks, (f"{lowest:.0f} {unit}", f"{widest:.0f} {unit}"), highest)


def _place(across: float, up: float) -> tuple[float, float]:
    """From shares of the plot's area to its coordinates."""
    return (
        round(_MARGIN + across * (_WIDTH - 2 * _MARGIN), 1),
        round(_HEIGHT - _MARGIN / 2 - up * (_HEIGHT - _MARGIN), 1),
    )


def _svg(marks: Sequence[str], ends: tuple[str, str], highest: float) -> str:
    left, bottom = _place(0, 0)
    right, top = _place(1, 1)
    axes = f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>'
    labels = (
        f'<text x="{left}" y="{_HEIGHT - 8}">{html.escape(ends[0])}</text>'
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{html.escape(ends[1])}</text>'
        f'<text x="{left - 6}" y="{top + 5}" text-anchor="end">{highest:.3g}</text>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end">0</text>'
    )
    body = "".join(marks)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" role="img">{axes}{labels}{body}</svg>'
