"""Measures a package on this machine, next to a bare loop on the same session in the same run.

Absolute rates drift between runs and machines, so the engine's cost is told by its ratio to the bare loop: nothing but
bind, run, argmax. Engine and bare loop take turns, so that both see the same machine.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from lamplighter_agent.engine.events import Timings
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.session import FloatArray, IntArray, ModelSession, onnxruntime_version
from lamplighter_agent.errors import EngineError, RequestError

_TEXT: Final = "The quick brown fox jumps over the lazy dog near the river bank while the sun sets slowly. "
_SHORT_PROMPT_TOKENS: Final = 25


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the runs; rates in tokens a second.

    Attributes:
        package: ``name/version``.
        onnxruntime: Version.
        threads: Compute threads.
        prepared: True if a prepared copy was loaded.
        runs: How often each figure was measured.
        prompt_tokens: Length of the prompt of the prefill figures.
        generated_tokens: Tokens of the decode figures, after a prompt of 25.
        load_s: Opening the package, imports not counted.
        first_token_s: From submission to the first token, prompt of 25 tokens.
        prefill_tokens_per_s: The engine, sampling of the first token included.
        decode_tokens_per_s: The engine, greedy, detokenized.
        bare_prefill_tokens_per_s: The bare loop on the whole prompt at once, with the weights for decoding.
        bare_decode_tokens_per_s: The bare loop, greedy.
        prefill_ratio: Engine to bare loop, run by run: what else the machine does weighs on both.
        decode_ratio: The same for decode.
        rss_loaded_bytes: Resident memory after the load.
        rss_anonymous_bytes: Resident memory after the first run that is no file's, so that the system cannot drop it.
        peak_rss_bytes: Highest resident memory after the first run, before the bare loop's.
        python_step_s: What the engine adds to a decode step: the time of a token that is not spent in the model.
    """

    package: str
    onnxruntime: str
    threads: int
    prepared: bool
    runs: int
    prompt_tokens: int
    generated_tokens: int
    load_s: float
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bare_prefill_tokens_per_s: float
    bare_decode_tokens_per_s: float
    prefill_ratio: float
    decode_ratio: float
    rss_loaded_bytes: int
    rss_anonymous_bytes: int
    peak_rss_bytes: int
    python_step_s: float


def run_bench(
    package: Path,
    *,
    options: EngineOptions | None = None,
    prepared_root: Path | None = None,
    runs: int = 3,
    prompt_tokens: int = 512,
    generated_tokens: int = 200,
) -> BenchResult:
    """Measure a package.

    Args:
        package: The package directory.
        options: Limits and choices of the engine.
        prepared_root: Where prepared copies lie, or None.
        runs: Repetitions, >= 1; each figure is a median.
        prompt_tokens: Length of the prompt of the prefill figures.
        generated_tokens: Tokens to decode, >= 2.

    Raises:
        RequestError: If a count is out of range or does not fit the engine's context.
        LamplighterError: If the package cannot be loaded or run.
    """
    if runs < 1 or prompt_tokens < 1 or generated_tokens < 2:
        raise RequestError("a bench needs at least 1 run, 1 prompt token and 2 generated tokens", param="runs")
    engine, load_s = _timed_load(package, options, prepared_root)
    rss_loaded = _memory_bytes("VmRSS")
    rounds = _measure(engine, runs, prompt_tokens, generated_tokens)
    load_times = [load_s, *(_timed_load(package, options, prepared_root)[1] for _ in range(runs - 1))]
    prefill, decode = (statistics.median(rates) for rates in (rounds.prefills, rounds.decodes))
    bare_prefill, bare_decode = (statistics.median(rates) for rates in (rounds.bare_prefills, rounds.bare_decodes))
    return BenchResult(
        package=engine.manifest.reference,
        onnxruntime=onnxruntime_version(),
        threads=engine.threads,
        prepared=engine.prepared,
        runs=runs,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        load_s=statistics.median(load_times),
        first_token_s=statistics.median(rounds.first_tokens),
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        bare_prefill_tokens_per_s=bare_prefill,
        bare_decode_tokens_per_s=bare_decode,
        prefill_ratio=_median_ratio(rounds.prefills, rounds.bare_prefills),
        decode_ratio=_median_ratio(rounds.decodes, rounds.bare_decodes),
        rss_loaded_bytes=rss_loaded,
        rss_anonymous_bytes=rounds.anonymous_bytes,
        peak_rss_bytes=rounds.peak_bytes,
        python_step_s=statistics.median(rounds.python_steps_s),
    )


@dataclass(slots=True)
class _Rounds:
    """What each run gave: rates in tokens a second, durations in seconds; memory of the first run."""

    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    python_steps_s: list[float] = field(default_factory=list)
    bare_prefills: list[float] = field(default_factory=list)
    bare_decodes: list[float] = field(default_factory=list)
    anonymous_bytes: int = 0
    peak_bytes: int = 0


def _measure(engine: Engine, runs: int, prompt_tokens: int, generated_tokens: int) -> _Rounds:
    prompt = _prompt(engine, max(prompt_tokens, _SHORT_PROMPT_TOKENS))
    long, short = prompt[:prompt_tokens], prompt[:_SHORT_PROMPT_TOKENS]
    capacity = max(prompt_tokens, _SHORT_PROMPT_TOKENS + generated_tokens)
    bare = _BareLoop(engine.session, engine.runner.cache, capacity)
    rounds = _Rounds()
    for number in range(runs):
        rounds.prefills.append(_engine_timings(engine, long, 1).prompt_tokens_per_s)
        if number:
            rounds.bare_prefills.append(bare.prefill_rate(long))
        in_model_s = engine.runner.decode_s
        timings = _engine_timings(engine, short, generated_tokens)
        outside_s = timings.decode_s - (engine.runner.decode_s - in_model_s)
        rounds.python_steps_s.append(outside_s / (generated_tokens - 1))
        rounds.decodes.append(timings.generated_tokens_per_s)
        rounds.first_tokens.append(timings.first_token_s)
        if number == 0:
            rounds.anonymous_bytes, rounds.peak_bytes = _unfiled_bytes(), _memory_bytes("VmHWM")
            rounds.bare_prefills.append(bare.prefill_rate(long))
        rounds.bare_decodes.append(bare.decode_rate(short, generated_tokens))
    return rounds


class _BareLoop:
    """The least that generates on a session: a cache of its own for one row, bind, run, argmax."""

    def __init__(self, session: ModelSession, like: KVCache, capacity: int) -> None:
        self._session = session
        self._cache = KVCache(like.spec, slots=1, capacity=capacity)
        self._binding = session.bind(self._cache.buffers)
        self._ones: IntArray = np.ones((1, capacity), dtype=np.int64)
        self._positions: IntArray = np.arange(capacity, dtype=np.int64).reshape(1, -1)

    def prefill_rate(self, prompt: list[int]) -> float:
        """Return the tokens a second of a whole prompt at once."""
        begun = time.perf_counter()
        self._prefill(prompt)
        return len(prompt) / (time.perf_counter() - begun)

    def decode_rate(self, prompt: list[int], tokens: int) -> float:
        """Return the tokens a second after the first of ``tokens`` tokens."""
        token_id, length = self._prefill(prompt), len(prompt)
        input_ids: IntArray = np.empty((1, 1), dtype=np.int64)
        logits: FloatArray = np.empty((1, 1, self._session.io.logits_width), dtype=np.float32)
        self._binding.set_logits(logits, start=0)
        begun = time.perf_counter()
        for _ in range(tokens - 1):
            input_ids[0, 0] = token_id
            length += 1
            self._binding.set_inputs(input_ids, self._ones[:, :length], self._positions[:, length - 1 : length])
            self._binding.run()
            token_id = int(logits[0, 0].argmax())
        return (tokens - 1) / (time.perf_counter() - begun)

    def _prefill(self, prompt: list[int]) -> int:
        count = len(prompt)
        start = count - 1 if self._session.io.has_logits_start else 0
        logits: FloatArray = np.empty((1, count - start, self._session.io.logits_width), dtype=np.float32)
        self._binding.set_inputs(np.array([prompt], dtype=np.int64), self._ones[:, :count], self._positions[:, :count])
        self._binding.set_logits(logits, start=start)
        self._binding.run()
        return int(logits[0, -1].argmax())


def _median_ratio(rates: list[float], bare_rates: list[float]) -> float:
    return statistics.median(rate / bare for rate, bare in zip(rates, bare_rates, strict=True))


def _timed_load(package: Path, options: EngineOptions | None, prepared_root: Path | None) -> tuple[Engine, float]:
    begun = time.perf_counter()
    engine = Engine.load(package, options=options, prepared_root=prepared_root)
    return engine, time.perf_counter() - begun


def _prompt(engine: Engine, tokens: int) -> list[int]:
    text = _TEXT
    while len(prompt := engine.encode_prompt(text)) < tokens:
        text += text
    return prompt[:tokens]


def _engine_timings(engine: Engine, prompt: list[int], tokens: int) -> Timings:
    params = GenerationParams(
        max_tokens=tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        cache_prompt=False,
        speculation=False,
    )
    *_, last = engine.generate(prompt, params)
    if last.finished is None or last.finished.usage.generated_tokens != tokens:
        raise EngineError(f"the bench's generation ended before {tokens} tokens")
    return last.finished.timings


def _unfiled_bytes() -> int:
    """Return resident bytes that belong to no file: the KV cache counts as shared memory."""
    return _memory_bytes("RssAnon") + _memory_bytes("RssShmem")


def _memory_bytes(name: str) -> int:
    """Return a field of this process's ``/proc`` status; 0 where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else 0
