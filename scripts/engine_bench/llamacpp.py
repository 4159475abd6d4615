"""llama.cpp through llama-cpp-python, in its defaults but for threads and context."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np


class LlamaCpp:
    """See ``measure.Engine``."""

    def __init__(self, model: llama_cpp.Llama, threads: int, context_tokens: int) -> None:
        self._model = model
        self._threads = threads
        self._context_tokens = context_tokens

    def stream(self, prompt: list[int], count: int, *, reuse: bool = False, speculate: bool = False) -> Iterator[int]:
        """Generate; ``reuse`` keeps the beginning that the last call has in common."""
        if speculate:
            raise ValueError("llama-cpp-python is measured without drafts")
        if not reuse:
            self._model.reset()
        tokens = self._model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        for _, token in zip(range(count), tokens, strict=False):
            yield token

    def together(self, prompts: list[list[int]], count: int) -> float:
        """Decode a batch of all prompts with the C interface, as its server does."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self._context_tokens, len(prompts)
        params.n_threads = params.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model.model, params)
        vocab_size = self._model.n_vocab()
        batch = llama_cpp.llama_batch_init(max(map(len, prompts)), 0, 1)

        def put(place: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = wanted

        def best(place: int) -> int:
            return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (vocab_size,)).argmax())

        last = []
        for sequence, prompt in enumerate(prompts):
            batch.n_tokens = len(prompt)
            for position, token in enumerate(prompt):
                put(position, token, position, sequence, wanted=position == len(prompt) - 1)
            _check(llama_cpp.llama_decode(context, batch))
            last.append(best(len(prompt) - 1))
        batch.n_tokens = len(prompts)
        begun = time.perf_counter()
        for step in range(count):
            for sequence, prompt in enumerate(prompts):
                put(sequence, last[sequence], len(prompt) + step, sequence, wanted=True)
            _check(llama_cpp.llama_decode(context, batch))
            last = [best(sequence) for sequence in range(len(prompts))]
        seconds = time.perf_counter() - begun
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return count * len(prompts) / seconds


def load(model: Path, threads: int, context_tokens: int) -> LlamaCpp:
    """Load a GGUF file."""
    opened = llama_cpp.Llama(
        str(model), n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    return LlamaCpp(opened, threads, context_tokens)


def _check(status: int) -> None:
    if status:
        raise SystemExit(f"llama_decode failed with {status}")
