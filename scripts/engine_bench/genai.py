"""onnxruntime-genai on a model folder whose configuration names the threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


class Genai:
    """See ``measure.Engine``."""

    def __init__(self, model: og.Model, context_tokens: int) -> None:
        self._model = model
        self._context_tokens = context_tokens

    def stream(self, prompt: list[int], count: int, *, reuse: bool = False, speculate: bool = False) -> Iterator[int]:
        """Generate; on the CPU it has no cache of prefixes, so ``reuse`` makes no difference."""
        if speculate:
            raise ValueError("onnxruntime-genai is measured without drafts")
        run = self._generator(1)
        run.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(count):
            run.generate_next_token()
            yield int(run.get_next_tokens()[0])

    def together(self, prompts: list[list[int]], count: int) -> float:
        """Generate as one batch; it wants prompts of one length."""
        length = min(map(len, prompts))
        run = self._generator(len(prompts))
        run.append_tokens(np.array([prompt[-length:] for prompt in prompts], dtype=np.int32))
        run.generate_next_token()
        begun = time.perf_counter()
        for _ in range(count):
            run.generate_next_token()
        return count * len(prompts) / (time.perf_counter() - begun)

    def _generator(self, batch: int) -> og.Generator:
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=self._context_tokens, min_length=self._context_tokens, batch_size=batch, do_sample=False
        )
        return og.Generator(self._model, params)


def load(model: Path, threads: int, context_tokens: int) -> Genai:
    """Open a folder; ``threads`` stands in its configuration (``models.make_models``)."""
    return Genai(og.Model(str(model)), context_tokens)
