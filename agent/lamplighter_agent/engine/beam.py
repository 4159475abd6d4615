"""Beam search: which beams go on and which are complete. No model here: logits in, parents and tokens out.

The rules are those of transformers' generate() with ``num_beams``, so that results can be compared: scores are sums of
processed log-probabilities, a complete text's score is divided by its number of tokens to the power
``length_penalty``, and ``early_stopping`` decides when open beams cannot matter any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.params import EarlyStopping
from lamplighter_agent.engine.processors import Processor
from lamplighter_agent.engine.truncation import Logits, top_candidates
from lamplighter_agent.errors import EngineError

_OUT: Final = -1.0e9
"""Score of what must not win: of the equal beams after the first at the start, and of a text that is complete."""


class Hypothesis(NamedTuple):
    """A text and its score: tokens behind the prompt, a final stop token included.

    Attributes:
        tokens: Generated tokens.
        score: Sum of log-probabilities by length to the power of the length penalty.
        complete: True if a stop token or stop text ended it, False if the limit, a deadline or a cancel did.
    """

    tokens: tuple[int, ...]
    score: float
    complete: bool


class _Candidate(NamedTuple):
    score: float
    beam: int
    token: int
    complete: bool


class BeamRules(NamedTuple):
    """What a search keeps and when it is over.

    Attributes:
        num_beams: Beams kept, at least 2.
        limit: Most tokens to generate.
        stop_ids: Tokens that complete a text.
        length_penalty: See above.
        early_stopping: See ``GenerationParams``.
    """

    num_beams: int
    limit: int
    stop_ids: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


class BeamSearch:
    """The beams of one request.

    Args:
        rules: How many, and until when.
        history: The prompt.
        processors: Rules, applied to log-probabilities.
        ends_text: Tells whether generated tokens hold a stop text at their end.

    Attributes:
        done: True once no open beam can change the result.
        generated: Tokens of each open beam.
    """

    def __init__(
        self,
        rules: BeamRules,
        history: History,
        *,
        processors: tuple[Processor, ...] = (),
        ends_text: Callable[[list[int]], bool] = lambda tokens: False,
    ) -> None:
        self._rules = rules
        self._processors = processors
        self._ends_text = ends_text
        self._open = [history.copy() for _ in range(rules.num_beams)]
        self._scores = [0.0] + [_OUT] * (rules.num_beams - 1)
        self._finished: list[Hypothesis] = []
        self._improvable = True
        self.done = False
        self.generated = 0

    def step(self, logits: list[Logits], vocab_size: int) -> tuple[list[int], list[int]]:
        """Take the next token of all beams.

        Args:
            logits: float32 [n] of each beam; before the first step all beams are one, and only the first row counts.
            vocab_size: Tokens that may be drawn; logits beyond are padding.

        Returns:
            For each beam that goes on the beam that it continues, and its token.

        Raises:
            EngineError: If logits are not finite.
        """
        candidates = self._best_candidates([row[:vocab_size] for row in logits])
        self.generated += 1
        over = all(candidate.complete for candidate in candidates)
        self._keep_finished(candidates)
        going = sorted(
            candidates, key=lambda candidate: candidate.score + (_OUT if candidate.complete else 0.0), reverse=True
        )[: self._rules.num_beams]
        self._scores = [candidate.score + (_OUT if candidate.complete else 0.0) for candidate in going]
        beams = []
        for candidate in going:
            history = self._open[candidate.beam].copy()
            history.append(candidate.token)
            beams.append(history)
        self._open = beams
        self._check_improvable()
        full = len(self._finished) == self._rules.num_beams
        self.done = over or not self._improvable or (full and self._rules.early_stopping is True)
        return [candidate.beam for candidate in going], [candidate.token for candidate in going]

    def best(self, count: int) -> list[Hypothesis]:
        """Return the ``count`` best texts, best first: complete ones, then open beams where there are too few."""
        found = list(self._finished)
        for history, score in zip(self._open, self._scores, strict=True):
            if len(found) < count and score > _OUT / 2:
                found.append(Hypothesis(_generated(history), self._final(score, max(self.generated, 1)), False))
        return sorted(found[:count], key=lambda hypothesis: -hypothesis.score)

    def _best_candidates(self, rows: list[Logits]) -> list[_Candidate]:
        """Return the best continuations of all beams, enough that ``num_beams`` go on whatever ends."""
        count = max(2, 1 + len(self._rules.stop_ids)) * self._rules.num_beams
        found: list[tuple[float, int, int]] = []
        for beam, history in enumerate(self._open):
            if self._scores[beam] <= _OUT and self.generated == 0:
                continue
            scores = _log_probabilities(rows[beam], history.generated + 1)
            for processor in self._processors:
                processor(scores, history)
            best = top_candidates(scores, count)
            found += [
                (self._scores[beam] + score, beam, token)
                for token, score in zip(best.ids.tolist(), best.logits.tolist(), strict=True)
            ]
        found.sort(key=lambda one: -one[0])
        return [_Candidate(*one, self._completes(*one[1:])) for one in found[:count]]

    def _completes(self, beam: int, token: int) -> bool:
        if token in self._rules.stop_ids or self.generated + 1 >= self._rules.limit:
            return True
        return self._ends_text([*_generated(self._open[beam]), token])

    def _keep_finished(self, candidates: list[_Candidate]) -> None:
        """Add what is complete among the ``num_beams`` best; the others only stand in for it."""
        full = len(self._finished) == self._rules.num_beams
        if not self._improvable or (full and self._rules.early_stopping is True):
            return
        for candidate in candidates[: self._rules.num_beams]:
            if candidate.complete:
                tokens = (*_generated(self._open[candidate.beam]), candidate.token)
                complete = candidate.token in self._rules.stop_ids or self._ends_text(list(tokens))
                self._finished.append(Hypothesis(tokens, self._final(candidate.score, self.generated), complete))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._rules.num_beams :]

    def _check_improvable(self) -> None:
        if len(self._finished) < self._rules.num_beams:
            return
        longest = self._rules.early_stopping == "never" and self._rules.length_penalty > 0.0
        possible = self._final(self._scores[0], self._rules.limit if longest else self.generated)
        self._improvable = self._improvable and possible > self._finished[-1].score

    def _final(self, score: float, length: int) -> float:
        return float(score / length**self._rules.length_penalty)


def place_beams(rows: list[int], parents: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Give each beam a cache row with as few copies as there are.

    Args:
        rows: The row of each beam before the step.
        parents: For each beam after the step the beam that it continues.

    Returns:
        The row of each beam after the step, and the copies (from row, to row): into rows that no beam needs any more,
        so their order does not matter.
    """
    placed: dict[int, int] = {}
    for beam, parent in enumerate(parents):
        if rows[parent] not in placed.values():
            placed[beam] = rows[parent]
    free = [row for row in rows if row not in placed.values()]
    copies = []
    for beam, parent in enumerate(parents):
        if beam not in placed:
            placed[beam] = free.pop(0)
            copies.append((rows[parent], placed[beam]))
    return [placed[beam] for beam in range(len(parents))], copies


def _log_probabilities(row: Logits, place: int) -> Logits:
    highest = float(row.max())
    if not math.isfinite(highest):
        raise EngineError(f"the model gave logits that are not finite, at generated token {place}")
    shifted: Logits = row - np.float32(highest)
    total = math.log(float(np.exp(shifted).sum(dtype=np.float64)))
    return shifted - np.float32(total)


def _generated(history: History) -> tuple[int, ...]:
    return tuple(history.tokens[history.prompt_tokens :].tolist())
