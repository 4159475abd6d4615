"""The fidelity report as a page of its own that needs nothing from anywhere else.

It is HTML that is XML as well, so that any parser can check it, and follows the reader's choice of light or dark.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lamplighter_builder.quantization.report import Alternative, MatrixReport, Report, comparisons

_WIDTH: Final = 760
_HEIGHT: Final = 300
_LEFT: Final = 64
_RIGHT: Final = 16
_TOP: Final = 28
_BOTTOM: Final = 44

_LIGHT: Final = ("#2f5fa8", "#b8501f", "#1c7a4a", "#9b2c6e", "#7a6a14", "#555555")
_DARK: Final = ("#7fb0ff", "#ff9e6b", "#5fce98", "#ff8fc8", "#d8c44f", "#b8b8b8")
_TAKEN: Final = "taken"


def _style() -> str:
    def colours(values: Sequence[str], ink: str, paper: str, faint: str, grid: str, alarm: str) -> str:
        named = {f"c{index}": value for index, value in enumerate(values)}
        named |= {"ink": ink, "paper": paper, "faint": faint, "grid": grid, _TAKEN: alarm}
        return "".join(f"--{name}:{value};" for name, value in named.items())

    kinds = "".join(
        f".{name}{{color:var(--{name});fill:var(--{name})}}"
        for name in (*(f"c{i}" for i in range(len(_LIGHT))), _TAKEN)
    )
    return (
        f":root{{color-scheme:light dark;{colours(_LIGHT, '#111111', '#ffffff', '#595959', '#dddddd', '#c00000')}}}"
        f"@media(prefers-color-scheme:dark){{:root{{"
        f"{colours(_DARK, '#e8e8e8', '#161616', '#a8a8a8', '#3a3a3a', '#ff6b6b')}}}}}"
        "body{font:15px/1.4 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:var(--ink);"
        "background:var(--paper);overflow-wrap:anywhere}"
        "table{border-collapse:collapse}th{text-align:left;font-weight:normal;color:var(--faint)}"
        "th,td{padding:.15em 1.2em .15em 0;vertical-align:top;font-variant-numeric:tabular-nums}"
        "th[scope=row]{min-width:11em}.warning{color:var(--taken)}"
        "svg{width:100%;height:auto}svg text{fill:var(--ink)}.axis{stroke:var(--faint);fill:none}"
        f".grid{{stroke:var(--grid)}}.curve{{stroke:var(--c0);fill:none}}{kinds}"
    )


def render_page(report: Report) -> bytes:
    """Return a report as HTML."""
    title = f"Fidelity of {html.escape(report.package)}"
    parts = [_facts(report), *(f'<p class="warning">Warning: {html.escape(text)}</p>' for text in report.warnings)]
    if report.alternatives:
        parts += ["<h2>Divergence by size</h2>", _sizes(report), _alternatives(report.alternatives)]
    if report.matrices:
        parts += ["<h2>Relative error of each matrix's output</h2>", _errors(report.matrices), _table(report.matrices)]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<title>{title}</title><style>{_style()}</style></head><body><h1>{title}</h1>"
    )
    return f"{head}{''.join(parts)}</body></html>\n".encode()


def _facts(report: Report) -> str:
    fidelity = report.fidelity
    facts = {"mean KL divergence": f"{fidelity.kl_mean:.4f} nats a token"}
    if fidelity.kl_median is not None and fidelity.kl_p99 is not None:
        facts["median, 99th percentile"] = f"{fidelity.kl_median:.4f}, {fidelity.kl_p99:.4f}"
    facts["same most likely token"] = f"{fidelity.top1_agreement:.1%}"
    if fidelity.perplexity is not None:
        facts["perplexity"] = f"{fidelity.perplexity:.2f} (reference {fidelity.reference_perplexity:.2f})"
    facts |= comparisons(fidelity)
    facts["compared with"] = f"{fidelity.reference}, on {fidelity.tokens} tokens"
    facts["model and weights"] = f"{report.model_bytes / 1e6:.1f} MB"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>' for key, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _details(summary: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<details><summary>{html.escape(summary)}</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def _table(matrices: Sequence[MatrixReport]) -> str:
    rows = [
        (
            matrix.path,
            str(matrix.bits),
            str(matrix.block_size),
            "no" if matrix.symmetric else "yes",
            f"{matrix.nbytes / 1e6:.2f}",
            f"{matrix.error:.4f}",
        )
        for matrix in matrices
    ]
    return _details("All matrices", ("matrix", "bits", "block", "zero points", "MB", "relative error"), rows)


def _alternatives(points: Sequence[Alternative]) -> str:
    rows = [
        (f"{point.nbytes / 1e6:.1f}", f"{point.expected_kl:.4f}", point.name or "mixed formats")
        for point in sorted(points, key=lambda point: point.nbytes)
    ]
    return _details("All sizes that were weighed", ("MB of matrices", "expected KL", "formats"), rows)


def _errors(matrices: Sequence[MatrixReport]) -> str:
    """Plot the error of each matrix over the order of the graph, a colour for each kind, a size for its bits."""
    kinds = list(dict.fromkeys(matrix.path.rsplit(".", 1)[-1] for matrix in matrices))
    colours = {kind: f"c{index % len(_LIGHT)}" for index, kind in enumerate(kinds)}
    highest = max(matrix.error for matrix in matrices) or 1.0
    last = max(len(matrices) - 1, 1)
    across = [(index / last, label) for index, label in _layer_labels(matrices).items()]
    upward = [(share, f"{share * highest:.2g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    marks = list(_axes(across, upward, "layer", "root mean square of the change by that of the output"))
    for index, matrix in enumerate(matrices):
        title = f"{matrix.path}: {matrix.error:.4f}, {matrix.bits} bits in blocks of {matrix.block_size}"
        place = (index / last, matrix.error / highest)
        marks.append(_dot(place, colours[matrix.path.rsplit(".", 1)[-1]], title, radius=matrix.bits - 2))
    legend = _legend(colours)
    return f"{_svg(marks, 'Relative error by matrix')}<p>{legend} The more bits, the larger the dot.</p>"


def _layer_labels(matrices: Sequence[MatrixReport]) -> Mapping[int, str]:
    """Return up to ten numbers of layers, by the index of the first matrix of each."""
    first: dict[str, int] = {}
    for index, matrix in enumerate(matrices):
        if (found := re.search(r"\.(\d+)\.", matrix.path)) is not None:
            first.setdefault(found[1], index)
    step = max(1, -(-len(first) // 10))
    return {index: number for number, index in list(first.items())[::step]}


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

    across = [(share, f"{(lowest + share * (widest - lowest)) / 1e6:.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    upward = [((power - floor) / (ceiling - floor), f"{10.0**power:g}") for power in range(floor, ceiling + 1)]
    marks = list(_axes(across, upward, "MB of all matrices", "mean KL divergence, nats a token"))
    mixed = [point for point in report.alternatives if not point.name]
    line = " ".join("{},{}".format(*_place(*place(point.nbytes, point.expected_kl))) for point in mixed)
    marks.append(f'<polyline points="{line}" class="curve"/>')
    for point in report.alternatives:
        title = f"{point.name or 'mixed formats'}, {point.nbytes / 1e6:.1f} MB: {point.expected_kl:.4f} nats expected"
        marks.append(_dot(place(point.nbytes, point.expected_kl), "c1" if point.name else "c0", title))
    title = f"this package, {taken / 1e6:.1f} MB of matrices: {report.fidelity.kl_mean:.4f} nats measured"
    marks.append(_dot(place(taken, report.fidelity.kl_mean), _TAKEN, title, radius=7))
    legend = _legend(
        {
            "expected of mixed formats": "c0",
            "expected of one format for all matrices": "c1",
            "this package, measured": _TAKEN,
        }
    )
    return (
        f"{_svg(marks, 'Divergence by size')}<p>{legend}</p>"
        "<p>Mixed formats keep the bound on the time of a decode step; one format for all matrices may break it.</p>"
    )


def _legend(colours: Mapping[str, str]) -> str:
    """Return names [text → colour] with their dots."""
    return " ".join(f'<span class="{colour}">&#9679; {html.escape(name)}</span>' for name, colour in colours.items())


def _axes(
    across: Sequence[tuple[float, str]], upward: Sequence[tuple[float, str]], below: str, above: str
) -> Iterator[str]:
    """Yield both axes with labels at shares of their lengths, and what they tell."""
    left, bottom = _place(0, 0)
    right, top = _place(1, 1)
    for share, label in upward:
        _, y = _place(0, share)
        yield f'<path d="M{left} {y}H{right}" class="grid"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>'
    yield f'<path d="M{left} {top}V{bottom}H{right}" class="axis"/>'
    for share, label in across:
        x, _ = _place(share, 0)
        yield f'<path d="M{x} {bottom}v4" class="axis"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{html.escape(label)}</text>'
    yield f'<text x="{(left + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(below)}</text>'
    yield f'<text x="{left}" y="14">{html.escape(above)}</text>'


def _dot(place: tuple[float, float], colour: str, title: str, *, radius: int = 4) -> str:
    x, y = _place(*place)
    return f'<circle cx="{x}" cy="{y}" r="{radius}" class="{colour}"><title>{html.escape(title)}</title></circle>'


def _place(across: float, up: float) -> tuple[float, float]:
    """From shares of the plot's area to its coordinates."""
    return (
        round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
        round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
    )


def _svg(marks: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="12" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(marks)}</svg>"
    )
