"""The fidelity report as a page of its own that needs nothing from anywhere else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Final

from lamplighter_agent.package.fidelity import Fidelity
from lamplighter_builder.quantization.report import MatrixReport, Report

_WIDTH: Final = 760
_HEIGHT: Final = 280
_MARGIN: Final = 56
_COLOURS: Final = ("#3366aa", "#cc6633", "#228855", "#aa3377", "#887722", "#555555")
_TAKEN_COLOUR: Final = "#cc0000"
_STYLE: Final = (
    "body{font:15px sans-serif;max-width:52em;margin:2em auto;padding:0 1em}th{text-align:left;padding-right:2em;"
    "font-weight:normal;color:#555}td{font-variant-numeric:tabular-nums;padding-right:1em}.warning{color:#a00}"
)


def render_page(report: Report) -> bytes:
    """Return a report as HTML."""
    title = f"Fidelity of {html.escape(report.package)}"
    parts = [_facts(report), *(f"<p class=warning>Warning: {html.escape(text)}" for text in report.warnings)]
    if report.alternatives:
        parts += ["<h2>Divergence by size</h2>", _sizes(report)]
    if report.matrices:
        parts += ["<h2>Relative error of each matrix's output</h2>", _errors(report.matrices), _table(report.matrices)]
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    return (head + "".join(parts)).encode()


def _facts(report: Report) -> str:
    fidelity = report.fidelity
    facts = {"mean KL divergence": f"{fidelity.kl_mean:.4f} nats a token"}
    if fidelity.kl_median is not None and fidelity.kl_p99 is not None:
        facts["median, 99th percentile"] = f"{fidelity.kl_median:.4f}, {fidelity.kl_p99:.4f}"
    facts["same most likely token"] = f"{fidelity.top1_agreement:.1%}"
    if fidelity.perplexity is not None:
        facts["perplexity"] = f"{fidelity.perplexity:.2f} (reference {fidelity.reference_perplexity:.2f})"
    facts |= _comparisons(fidelity)
    facts["compared with"] = f"{fidelity.reference}, on {fidelity.tokens} tokens"
    facts["model and weights"] = f"{report.model_bytes / 1e6:.1f} MB"
    rows = "".join(f"<tr><th>{html.escape(key)}<td>{html.escape(value)}" for key, value in facts.items())
    return f"<table>{rows}</table>"


def _comparisons(fidelity: Fidelity) -> dict[str, str]:
    found = {}
    if (answers := fidelity.generation) is not None:
        found["greedy answers"] = (
            f"{answers.agreement:.1%} of {answers.tokens} tokens as the reference would choose; "
            f"{answers.identical_answers} of {answers.prompts} the same throughout, "
            f"{answers.tokens_until_difference:.0f} tokens until the first difference on average; "
            f"{answers.endless_loops} in an endless loop that the reference would leave"
        )
    if (level := fidelity.accuracy_level) is not None:
        found["accuracy level 4 instead of 1"] = (
            f"{level.flipped:.1%} of most likely tokens change; mean KL {level.kl_mean:.4f} instead of "
            f"{level.level_1_kl_mean:.4f}"
        )
    return found


def _table(matrices: Sequence[MatrixReport]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(matrix.path)}<td>{matrix.bits} bits<td>blocks of {matrix.block_size}"
        f"<td>{'symmetric' if matrix.symmetric else 'zero points'}"
        f"<td>{matrix.nbytes / 1e6:.2f} MB<td>{matrix.error:.4f}"
        for matrix in matrices
    )
    return f"<details><summary>All matrices</summary><table>{rows}</table></details>"


def _errors(matrices: Sequence[MatrixReport]) -> str:
    """Plot the error of each matrix over the order of the graph, a colour for each kind, a size for its bits."""
    kinds = list(dict.fromkeys(matrix.path.rsplit(".", 1)[-1] for matrix in matrices))
    highest = max(matrix.error for matrix in matrices) or 1.0
    marks = list(
        _axes([(0, "first"), (1, "last matrix")], [(share, f"{share * highest:.2g}") for share in (0, 0.5, 1)])
    )
    for index, matrix in enumerate(matrices):
        colour = _COLOURS[kinds.index(matrix.path.rsplit(".", 1)[-1]) % len(_COLOURS)]
        title = f"{matrix.path}: {matrix.error:.4f}, {matrix.bits} bits in blocks of {matrix.block_size}"
        place = (index / max(len(matrices) - 1, 1), matrix.error / highest)
        marks.append(_dot(place, colour, title, radius=matrix.bits - 2))
    legend = " ".join(
        f'<span style="color:{_COLOURS[index % len(_COLOURS)]}">&#9679; {html.escape(kind)}</span>'
        for index, kind in enumerate(kinds)
    )
    return f"{_svg(marks)}<p>{legend}; the more bits, the larger the dot"


def _sizes(report: Report) -> str:
    """Plot the expected divergence over the bytes of all matrices, and what was measured of the choice taken."""
    taken = sum(matrix.nbytes for matrix in report.matrices)
    sizes = [point.nbytes for point in report.alternatives] + [taken]
    heights = [point.expected_kl for point in report.alternatives] + [report.fidelity.kl_mean]
    lowest, widest = min(sizes), max(sizes)
    floor = math.floor(math.log10(max(min(heights), 1e-6)))
    ceiling = max(math.ceil(math.log10(max(*heights, 1e-6))), floor + 1)

    def place(nbytes: int, height: float) -> tuple[float, float]:
        up = (math.log10(max(height, 1e-6)) - floor) / (ceiling - floor)
        return (nbytes - lowest) / (widest - lowest or 1), up

    across = [(share, f"{(lowest + share * (widest - lowest)) / 1e6:.3g} MB") for share in (0, 0.25, 0.5, 0.75, 1)]
    upward = [((power - floor) / (ceiling - floor), f"{10.0**power:g}") for power in range(floor, ceiling + 1)]
    marks = list(_axes(across, upward))
    mixed = [point for point in report.alternatives if not point.name]
    line = " ".join("{},{}".format(*_place(*place(point.nbytes, point.expected_kl))) for point in mixed)
    marks.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[0]}"/>')
    for point in report.alternatives:
        title = f"{point.name or 'mixed formats'}, {point.nbytes / 1e6:.1f} MB: {point.expected_kl:.4f} nats expected"
        colour = _COLOURS[1] if point.name else _COLOURS[0]
        marks.append(_dot(place(point.nbytes, point.expected_kl), colour, title))
    title = f"this package, {taken / 1e6:.1f} MB of matrices: {report.fidelity.kl_mean:.4f} nats measured"
    marks.append(_dot(place(taken, report.fidelity.kl_mean), _TAKEN_COLOUR, title, radius=7))
    return (
        f"{_svg(marks)}<p>Mean KL divergence, nats a token, by bytes of all matrices. "
        f'<span style="color:{_COLOURS[0]}">&#9679; expected of mixed formats</span> '
        f'<span style="color:{_COLOURS[1]}">&#9679; expected of one format for all matrices</span> '
        f'<span style="color:{_TAKEN_COLOUR}">&#9679; this package, measured</span></p>'
        "<p>Mixed formats keep the bound on the time of a decode step; one format for all matrices may break it.</p>"
    )


def _axes(across: Sequence[tuple[float, str]], upward: Sequence[tuple[float, str]]) -> Iterator[str]:
    """Yield both axes with labels at shares of their lengths."""
    left, bottom = _place(0, 0)
    right, top = _place(1, 1)
    yield f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#888"/>'
    for share, label in across:
        x, _ = _place(share, 0)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        yield f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{html.escape(label)}</text>'
    for share, label in upward:
        _, y = _place(0, share)
        yield f'<path d="M{left} {y}H{right}" stroke="#ddd"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>'


def _dot(place: tuple[float, float], colour: str, title: str, *, radius: int = 4) -> str:
    x, y = _place(*place)
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"><title>{html.escape(title)}</title></circle>'


def _place(across: float, up: float) -> tuple[float, float]:
    """From shares of the plot's area to its coordinates."""
    return (
        round(_MARGIN + across * (_WIDTH - 2 * _MARGIN), 1),
        round(_HEIGHT - _MARGIN / 2 - up * (_HEIGHT - _MARGIN), 1),
    )


def _svg(marks: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" role="img">{"".join(marks)}</svg>'
