"""Our engine, through the library's public calls, from a prepared copy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine_bench.samplers import sampler_costs
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.package.manifest import CacheDtype


class Ours:
    """See ``measure.Engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def stream(self, prompt: list[int], count: int, *, reuse: bool = False, speculate: bool = False) -> Iterator[int]:
        """Generate; each token comes as the engine gives it."""
        for token in self._engine.generate(prompt, _params(count, reuse=reuse, speculate=speculate)):
            if token.token_id is not None:
                yield token.token_id

    def together(self, prompts: list[list[int]], count: int) -> float:
        """Submit all at once and step; count the tokens after the last one's first."""
        scheduler = self._engine.scheduler
        for number, prompt in enumerate(prompts):
            scheduler.submit(f"stream-{number}", prompt, _params(count, reuse=False, speculate=False))
        begun: set[str] = set()
        marks: list[float] = []
        while not scheduler.idle and len(marks) < count * len(prompts):
            for event in scheduler.step():
                if isinstance(event, TextDelta):
                    begun.add(event.request_id)
                    if len(begun) == len(prompts):
                        marks.append(time.perf_counter())
            if marks and scheduler.running < len(prompts):
                break
        while not scheduler.idle:
            scheduler.step()
        return (len(marks) - 1) / (marks[-1] - marks[0])

    def sampler_costs(self, prompts: list[list[int]]) -> dict[str, float]:
        """Return what a draw costs behind the prompts, by the kind of options."""
        runner, intake, rows = self._engine.runner, self._engine.scheduler.intake, []
        for prompt in prompts:
            rows.append(runner.prefill(0, prompt)[: intake.vocab_size])
            runner.cache.release(0)
        make_sampler = partial(intake.live_sampler, limit=len(prompts[0]))
        return sampler_costs(make_sampler, rows, prompts[0])


def load(model: Path, threads: int, context_tokens: int, cache: CacheDtype = "float32") -> Ours:
    """Load the package ``model`` from the prepared copies beside it, with a cache of this type."""
    # Weights for prompts are there if the copy was prepared with them.
    options = EngineOptions(
        threads=threads, max_context_tokens=context_tokens, prompt_weights=True, kv_cache_dtype=cache
    )
    engine = Engine.load(model, options=options, prepared_root=model.parent / "prepared")
    if not engine.prepared:
        raise SystemExit("the prepared copy was not used")
    return Ours(engine)


def _params(count: int, *, reuse: bool, speculate: bool) -> GenerationParams:
    return GenerationParams(
        max_tokens=count,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        cache_prompt=reuse,
        speculation=speculate,
    )
