"""From the rounds' figures to the table of ratios and to plots."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from engine_bench.samplers import PREFIX

Rounds = list[dict[str, dict[str, float]]]
"""For each round, for each engine, its figures."""

MIB = 1024 * 1024


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        work: What is compared.
        ours, theirs: Names of the figures.
        unit: Unit, and what a figure is divided by.
        higher: True if higher is better.
        llamacpp, genai: Targets for ours divided by theirs.
    """

    work: str
    ours: str
    theirs: str
    unit: str
    scale: float
    higher: bool
    llamacpp: float
    genai: float


ROWS = (
    Row("decode, one stream", "decode_tokens_per_s", "decode_tokens_per_s", "tokens/s", 1, True, 1.3, 1.0),
    Row("prefill 512", "prefill_tokens_per_s", "prefill_tokens_per_s", "tokens/s", 1, True, 1.35, 1.2),
    Row("decode at 2,000", "long_decode_tokens_per_s", "long_decode_tokens_per_s", "tokens/s", 1, True, 1.4, 1.0),
    Row("four streams, total", "streams_tokens_per_s", "streams_tokens_per_s", "tokens/s", 1, True, 1.4, 1.5),
    Row("cached 512 prefix, first token", "second_first_token_s", "second_first_token_s", "ms", 1e-3, False, 1.0, 0.1),
    Row(
        "copy-heavy, to its plain decode", "copy_tokens_per_s", "copy_plain_tokens_per_s", "tokens/s", 1, True, 1.8, 1.3
    ),
    Row("peak RSS, 2,048 context", "peak_rss_bytes", "peak_rss_bytes", "MiB", MIB, False, 0.9, 0.4),
    Row("load to first token", "load_to_first_token_s", "load_to_first_token_s", "ms", 1e-3, False, 1.0, 0.7),
)


def table(rounds: Rounds, conditions: dict[str, object]) -> str:
    """Return the table as Markdown: absolute medians, and ratios to the best llama.cpp file and to genai."""
    lines = _comparison(rounds, "ours")
    plain, drafted = (
        statistics.median(one["ours"][name] for one in rounds)
        for name in ("copy_plain_tokens_per_s", "copy_tokens_per_s")
    )
    prose = statistics.median(
        one["ours"]["prose_speculative_tokens_per_s"] / one["ours"]["decode_tokens_per_s"] for one in rounds
    )
    gain = f"copy-heavy {drafted:.0f} against {plain:.0f} tokens/s without ({drafted / plain:.2f} times)"
    lines += ["", f"Speculation: {gain}; on prose {prose:.2f} times.", "", _sampler_costs(rounds), ""]
    lines += ["With `engine.kv_cache_dtype: int8`:", "", *_comparison(rounds, "ours int8"), ""]
    lines += [f"- {name}: {value}" for name, value in conditions.items()]
    return "\n".join(lines) + "\n"


def _comparison(rounds: Rounds, ours: str) -> list[str]:
    """Return the lines of a table: one of our engines and its peers, and the ratios to them."""
    llamacpp = [name for name in rounds[0] if name.startswith("llama.cpp")]
    names = [ours, *llamacpp, "genai"]
    lines = [
        "| work | " + " | ".join(names) + " | to the best llama.cpp | target | to genai | target |",
        "|---|" + "---|" * (len(names) + 4),
    ]
    for row in ROWS:
        cells = [f"{_median(rounds, name, row) / row.scale:.0f}" for name in names]
        sign = ">=" if row.higher else "<="
        for peers, target in ((llamacpp, row.llamacpp), (["genai"], row.genai)):
            ratio = _ratio(rounds, row, ours, peers)
            met = ratio >= target if row.higher else ratio <= target
            cells += [f"{ratio:.2f}{'' if met else ' (missed)'}", f"{sign} {target}"]
        lines.append(f"| {row.work} ({row.unit}) | " + " | ".join(cells) + " |")
    return lines


def _sampler_costs(rounds: Rounds) -> str:
    """Return a sentence with the medians of what a draw costs."""
    costs = {
        name.removeprefix(PREFIX): statistics.median(one["ours"][name] for one in rounds)
        for name in rounds[0]["ours"]
        if name.startswith(PREFIX)
    }
    listed = ", ".join(f"{name} {microseconds:.0f}" for name, microseconds in costs.items())
    return f"Choosing a token, us in Python and numpy: {listed}."


def draw_engines(rounds: Rounds, directory: Path) -> None:
    """Draw bars of every row's medians, with each round as a point: ``engines.svg``."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    names = list(rounds[0])
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    for axis, row in zip(axes.flat, ROWS, strict=True):
        for place, name in enumerate(names):
            values = [one[name][_figure(name, row)] / row.scale for one in rounds]
            axis.bar(place, statistics.median(values), color="tab:orange" if name.startswith("ours") else "tab:gray")
            axis.plot([place] * len(values), values, "k.", markersize=4)
        labels = [name.replace("llama.cpp", "llama").replace(" ", "\n") for name in names]
        axis.set_xticks(range(len(names)), labels, fontsize=8)
        axis.set_title(f"{row.work}, {row.unit}, {'higher' if row.higher else 'lower'} is better", fontsize=9)
    figure.tight_layout()
    figure.savefig(directory / "engines.svg")
    plt.close(figure)


def draw_soak(resident_bytes: list[int], directory: Path) -> None:
    """Draw resident memory after each request: ``soak.svg``."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4))
    axis.plot([value / MIB for value in resident_bytes])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests answered")
    axis.set_ylabel("resident memory of the worker, MiB")
    axis.axvline(100, color="gray", linestyle=":")
    figure.tight_layout()
    figure.savefig(directory / "soak.svg")
    plt.close(figure)


def _figure(name: str, row: Row) -> str:
    return row.ours if name.startswith("ours") else row.theirs


def _median(rounds: Rounds, name: str, row: Row) -> float:
    return statistics.median(one[name][_figure(name, row)] for one in rounds)


def _ratio(rounds: Rounds, row: Row, ours: str, peers: list[str]) -> float:
    """Return the median over the rounds of ours to the best peer of that round."""
    best = max if row.higher else min
    return statistics.median(one[ours][row.ours] / best(one[peer][row.theirs] for peer in peers) for one in rounds)
