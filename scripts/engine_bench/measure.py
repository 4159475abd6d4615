"""One process that measures one engine once and prints the figures as a line of JSON.

    python -m engine_bench.measure ENGINE MODEL WORKLOAD.json THREADS {speed,memory}

ENGINE is ``ours``, ``ours:int8`` (with that cache), ``llamacpp`` or ``genai``. Processes take turns, so that all
engines see the same machine.
``memory`` is a process that does nothing but load and serve one prompt of 1,900 tokens: its peak is that work's.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from engine_bench.workload import Workload, read_workload

CONTEXT_TOKENS = 2048
KIB = 1024


class Engine(Protocol):
    """What is asked of an engine; its module has ``load(model, threads, context_tokens)``, ours also a cache."""

    def stream(self, prompt: list[int], count: int, *, reuse: bool = False, speculate: bool = False) -> Iterator[int]:
        """Generate greedily, past any end of text; with ``reuse`` a known beginning need not be computed again."""

    def together(self, prompts: list[list[int]], count: int) -> float:
        """Generate behind all prompts at once; return the tokens a second in total once all of them decode."""


@runtime_checkable
class WithSamplers(Protocol):
    """An engine that guesses tokens, and tells what its samplers cost: ours."""

    def sampler_costs(self, prompts: list[list[int]]) -> dict[str, float]:
        """Return what a draw costs behind the prompts, by the kind of options."""


def main(arguments: list[str]) -> None:
    """Measure and print."""
    name, model, workload_path, threads, kind = arguments
    module_name, _, variant = name.partition(":")
    module = importlib.import_module(f"engine_bench.{module_name}")
    workload = read_workload(Path(workload_path))
    begun = time.perf_counter()
    engine: Engine = module.load(Path(model), int(threads), CONTEXT_TOKENS, *filter(None, [variant]))
    figures = _memory(engine, workload, begun) if kind == "memory" else _speed(engine, workload)
    print(json.dumps(figures), flush=True)


def _memory(engine: Engine, workload: Workload, begun: float) -> dict[str, float]:
    next(iter(engine.stream(workload.chat, 1)))
    first_s = time.perf_counter() - begun
    start, marks = _timed(engine, workload.long, workload.long_tokens)
    # The highest so far: what the end of a request does (keeping its prefix, say) counts as well.
    peak = _peak_rss_bytes()
    return {
        "load_to_first_token_s": first_s,
        "long_prefill_tokens_per_s": len(workload.long) / (marks[0] - start),
        "long_decode_tokens_per_s": _rate(marks),
        "peak_rss_bytes": peak,
    }


def _peak_rss_bytes() -> int:
    """Return the highest resident size of this program; ``ru_maxrss`` begins with that of the process it came from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * KIB


def _speed(engine: Engine, workload: Workload) -> dict[str, float]:
    _timed(engine, workload.chat, 8)
    figures = {"decode_tokens_per_s": _rate(_timed(engine, workload.chat, workload.decode_tokens)[1])}
    start, marks = _timed(engine, workload.prefix, 1)
    figures["prefill_tokens_per_s"] = len(workload.prefix) / (marks[0] - start)
    first, second = ([*workload.prefix, *suffix] for suffix in workload.suffixes)
    _timed(engine, first, 1, reuse=True)
    start, marks = _timed(engine, second, 1, reuse=True)
    figures["second_first_token_s"] = marks[0] - start
    figures["streams_tokens_per_s"] = engine.together(workload.streams, workload.stream_tokens)
    figures["copy_plain_tokens_per_s"] = _copies(engine, workload, speculate=False)
    if isinstance(engine, WithSamplers):
        _timed(engine, workload.copies[0], 48, speculate=True)  # the first drafts are compared, and slow
        figures["copy_tokens_per_s"] = _copies(engine, workload, speculate=True)
        figures["prose_speculative_tokens_per_s"] = _rate(
            _timed(engine, workload.chat, workload.decode_tokens, speculate=True)[1]
        )
        figures |= engine.sampler_costs([workload.copies[0], workload.chat])
    return figures


def _copies(engine: Engine, workload: Workload, *, speculate: bool) -> float:
    """Return the harmonic mean of the rates: all the tokens by all the time."""
    rates = [_rate(_timed(engine, prompt, workload.copy_tokens, speculate=speculate)[1]) for prompt in workload.copies]
    return statistics.harmonic_mean(rates)


def _timed(
    engine: Engine, prompt: list[int], count: int, *, reuse: bool = False, speculate: bool = False
) -> tuple[float, list[float]]:
    start = time.perf_counter()
    marks = [time.perf_counter() for _ in engine.stream(prompt, count, reuse=reuse, speculate=speculate)]
    if len(marks) != count:
        raise SystemExit(f"{len(marks)} tokens came instead of {count}")
    return start, marks


def _rate(marks: list[float]) -> float:
    return (len(marks) - 1) / (marks[-1] - marks[0])


if __name__ == "__main__":
    main(sys.argv[1:])
