"""From logits to a token: pure functions on float32 arrays of shape [vocab_size].

Order, as in Hugging Face's generate(): penalties and bias, temperature, top-k, top-p, min-p, draw. Only the tokens
that can still be drawn are exponentiated or sorted: a vocabulary of 256,000 stays cheap on a small CPU.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.events import TokenLogprob
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import EngineError

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]

_GROUP: Final = 64
_TOP_P_FIRST_GUESS: Final = 512


class Candidates(NamedTuple):
    """Tokens that may still be drawn, most likely first: ``ids`` int64 [n], ``logits`` float32 [n]."""

    ids: TokenIds
    logits: Logits


def apply_repetition_penalty(logits: Logits, seen: TokenIds, penalty: float) -> None:
    """Divide positive and multiply negative logits of the token ids ``seen`` [n] (unique), in place."""
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def apply_count_penalties(logits: Logits, ids: TokenIds, counts: Logits, *, presence: float, frequency: float) -> None:
    """Subtract ``presence + frequency * count`` from the logits of the generated ``ids`` [n] (unique), in place."""
    logits[ids] -= presence + frequency * counts


def top_candidates(logits: Logits, count: int) -> Candidates:
    """Return the ``count`` largest logits, largest first; equal logits in the order of their ids.

    The ``count``-th largest of the group maxima bounds the answer from below, and only groups that reach it are looked
    into: one pass over the vocabulary, whatever its size.
    """
    size, groups = logits.size, logits.size // _GROUP
    if count >= size:
        ids: TokenIds = np.arange(size, dtype=np.int64)
    elif count > groups // 4:
        ids = np.flatnonzero(logits >= np.partition(logits, size - count)[size - count])
    else:
        grouped = logits[: groups * _GROUP].reshape(_GROUP, groups)
        maxima = grouped.max(axis=0)
        bound = np.partition(maxima, groups - count)[groups - count]
        columns = np.flatnonzero(maxima >= bound)
        rows, chosen = np.nonzero(grouped[:, columns] >= bound)
        tail = groups * _GROUP + np.flatnonzero(logits[groups * _GROUP :] >= bound)
        # Rows come in order, columns within a row too, so ids ascend.
        ids = np.concatenate((rows * groups + columns[chosen], tail))
    values = logits[ids]
    order = np.argsort(-values, kind="stable")[:count]
    return Candidates(ids[order], values[order])


def keep_top_p(logits: Logits, top_p: float) -> Candidates:
    """Return the fewest most likely tokens whose probabilities reach ``top_p``; at least one."""
    total = float(np.exp(logits - logits.max()).sum(dtype=np.float64))
    count = _TOP_P_FIRST_GUESS
    while True:
        found = top_candidates(logits, min(count, logits.size))
        reached = np.cumsum(np.exp(found.logits - found.logits[0]), dtype=np.float64)
        if reached[-1] >= top_p * total or found.ids.size == logits.size:
            return _cut(found, int(np.searchsorted(reached, top_p * total)) + 1)
        count *= 8


def cut_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Return the leading candidates whose probabilities among the candidates reach ``top_p``; at least one."""
    reached = np.cumsum(np.exp(candidates.logits - candidates.logits[0]), dtype=np.float64)
    return _cut(candidates, int(np.searchsorted(reached, top_p * reached[-1])) + 1)


def cut_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Return the candidates at least ``min_p`` times as likely as the first."""
    bound = candidates.logits[0] + np.log(min_p)
    return _cut(candidates, int(np.count_nonzero(candidates.logits >= bound)))


def draw(logits: Logits, uniform: float) -> int:
    """Return the index that ``uniform`` in [0, 1) falls on in the distribution softmax(``logits``).

    Group by group first, then inside the group: no running sum over a large vocabulary.
    """
    weights = np.exp(logits - logits.max())
    starts = np.arange(0, weights.size, _GROUP)
    group, rest = _locate(np.add.reduceat(weights, starts), uniform)
    begin = int(starts[group])
    inside, _ = _locate(weights[begin : begin + _GROUP], rest)
    return begin + inside


def _locate(weights: Logits, share: float) -> tuple[int, float]:
    """Return the index at which the running sum passes ``share`` of the total, and the share of that index passed."""
    reached = np.cumsum(weights, dtype=np.float64)
    # Rounding may lift the product to the total itself, which would fall behind the last weight.
    point = min(share * reached[-1], np.nextafter(reached[-1], 0.0))
    index = int(np.searchsorted(reached, point, side="right"))
    before = reached[index - 1] if index else 0.0
    return index, float((point - before) / (reached[index] - before))


def log_probability(logits: Logits, token_id: int, top: int) -> TokenLogprob:
    """Return the log-probability of ``token_id`` and of the ``top`` most likely tokens under softmax(``logits``)."""
    highest = float(logits.max())
    log_total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = top_candidates(logits, top) if top else Candidates(np.empty(0, np.int64), np.empty(0, np.float32))
    alternatives = tuple(
        (other, value - log_total) for other, value in zip(best.ids.tolist(), best.logits.tolist(), strict=True)
    )
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, alternatives)


class Sampler:
    """Draws the tokens of one request; the only state is what was generated and the random generator.

    Args:
        params: Options with the package's defaults filled in (``GenerationParams.with_defaults``).
        prompt: Token ids of the prompt, for the repetition penalty.
        stop_ids: Tokens that may not be drawn before ``min_tokens``.
        seed: Seed of the random generator.
        vocab_size: Number of tokens that may be drawn; logits beyond it are padding.

    Attributes:
        stop_ids: As given.
    """

    def __init__(
        self, params: GenerationParams, prompt: list[int], *, stop_ids: frozenset[int], seed: int, vocab_size: int
    ) -> None:
        self._temperature = params.temperature or 0.0
        self._top_k = params.top_k or 0
        self._top_p = 1.0 if params.top_p is None else params.top_p
        self._min_p = params.min_p
        self._repetition = 1.0 if params.repetition_penalty is None else params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._logprobs = params.logprobs
        self._min_tokens = params.min_tokens
        self._vocab_size = vocab_size
        self._generated = 0
        self._random = np.random.Generator(np.random.PCG64(seed))
        self.stop_ids = stop_ids
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._seen = np.unique(np.array(prompt, dtype=np.int64)) if self._repetition != 1.0 else None
        self._counts: dict[int, int] = {}

    def sample(self, logits: Logits) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits: float32 [n], n >= vocab_size; not changed.

        Returns:
            The token id, and its log-probability if the request asked for log-probabilities.

        Raises:
            EngineError: If the model gave NaN or infinity.
        """
        raw = logits[: self._vocab_size]
        if not math.isfinite(float(raw.max())):
            raise EngineError(f"the model gave logits that are not finite, at generated token {self._generated + 1}")
        token_id = self._choose(self._process(raw))
        self._accept(token_id)
        report = None if self._logprobs is None else log_probability(raw, token_id, self._logprobs)
        return token_id, report

    def _process(self, raw: Logits) -> Logits:
        """Return the logits after penalties, bias and the ban of early stops; a copy only where one is needed."""
        early = self._generated < self._min_tokens and self._stop_ids.size > 0
        counted = bool(self._counts) and (self._presence != 0.0 or self._frequency != 0.0)
        if not (early or counted or self._bias_ids.size or self._seen is not None):
            return raw
        logits = raw.copy()
        if self._seen is not None:
            apply_repetition_penalty(logits, self._seen, self._repetition)
        if counted:
            ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            apply_count_penalties(logits, ids, counts, presence=self._presence, frequency=self._frequency)
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if early:
            logits[self._stop_ids] = -np.inf
        return logits

    def _choose(self, logits: Logits) -> int:
        if self._temperature == 0.0 or self._top_k == 1:
            return int(logits.argmax())
        scaled = logits if self._temperature == 1.0 else logits / np.float32(self._temperature)
        uniform = self._random.random()
        candidates: Candidates | None = None
        if 0 < self._top_k < scaled.size:
            candidates = top_candidates(scaled, self._top_k)
            if self._top_p < 1.0:
                candidates = cut_top_p(candidates, self._top_p)
        elif self._top_p < 1.0:
            candidates = keep_top_p(scaled, self._top_p)
        if candidates is None and self._min_p > 0.0:
            ids = np.flatnonzero(scaled >= scaled.max() + np.log(self._min_p))
            return int(ids[draw(scaled[ids], uniform)])
        if candidates is None:
            return draw(scaled, uniform)
        if self._min_p > 0.0:
            candidates = cut_min_p(candidates, self._min_p)
        return int(candidates.ids[draw(candidates.logits, uniform)])

    def _accept(self, token_id: int) -> None:
        self._generated += 1
        if self._presence != 0.0 or self._frequency != 0.0:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._seen is not None and token_id not in self._seen:
            self._seen = np.append(self._seen, token_id)


def _cut(candidates: Candidates, count: int) -> Candidates:
    return Candidates(candidates.ids[:count], candidates.logits[:count])
