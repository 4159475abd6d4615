"""From a row of logits to a token: the rules of one request, truncation, the draw.

The order of all steps stands in ``params.GenerationParams``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lamplighter_agent.engine.events import TokenLogprob
from lamplighter_agent.engine.history import History, TokenIds
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.processors import make_processors
from lamplighter_agent.engine.truncation import (
    Candidates,
    Logits,
    cut_min_p,
    cut_top_p,
    cut_typical,
    draw,
    exclude_top_choices,
    keep_min_p,
    keep_top_p,
    keep_typical,
    log_probability,
    top_candidates,
)
from lamplighter_agent.engine.words import Words
from lamplighter_agent.errors import EngineError, RequestError

Scorer = Callable[[TokenIds, Logits], Logits | None]
"""A caller's own rule: sees the tokens so far, int64 [n], and the logits, float32 [vocab_size]; changes them in place
or returns others. It comes first, so that bans and grammars hold whatever it does."""


class Constraint(Protocol):
    """A grammar's state; see ``guidance.Guide``."""

    @property
    def complete(self) -> bool:
        """True if nothing but the end of the text may follow."""

    def mask(self, logits: Logits) -> None:
        """Set the logits of tokens that the grammar does not allow to minus infinity."""

    def accept(self, token_id: int) -> None:
        """Go on behind a token that ``mask`` allowed."""

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` accepted tokens."""

    def copy(self) -> Constraint:
        """Return a state of its own at the same place."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What takes part in the choice of tokens from outside: the caller's own rule, and a grammar's state."""

    scorer: Scorer | None = None
    constraint: Constraint | None = None


class Sampler:
    """Draws the tokens of one request.

    Args:
        params: Options with the package's defaults filled in (``GenerationParams.with_defaults``).
        history: The prompt's tokens; drawn ones are added here.
        stop_ids: Tokens that may not be drawn before ``min_tokens``.
        seed: Seed of the random generator.
        vocab_size: Number of tokens that may be drawn; logits beyond it are padding.
        words: The options that are texts.
        hooks: The caller's own rule and the grammar's state.

    Attributes:
        stop_ids: As given.
        history: As given.
        params: As given.
        processors: The rules that the options ask for.
    """

    def __init__(
        self,
        params: GenerationParams,
        history: History,
        *,
        stop_ids: frozenset[int],
        seed: int,
        vocab_size: int,
        words: Words | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.stop_ids = stop_ids
        self.history = history
        self._vocab_size = vocab_size
        self._words = Words() if words is None else words
        hooks = Hooks() if hooks is None else hooks
        self._scorer = hooks.scorer
        self._constraint = hooks.constraint
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._forced: deque[int] = deque(self._words.prefix)
        self.params = params
        self.processors = make_processors(
            params, stop_ids=stop_ids, banned=self._words.banned, is_breaker=self._words.is_breaker
        )

    def draw_like(self, other: Sampler) -> None:
        """Go on with another sampler's random generator."""
        self._random = other._random

    def follow(self, other: Sampler) -> None:
        """Go on in another sampler's grammar."""
        self._constraint = other._constraint

    def accept(self, token_id: int) -> None:
        """Add a token that somebody else chose.

        Raises:
            EngineError: If the grammar does not allow it.
        """
        self._forced.clear()
        if self._constraint is not None and token_id not in self.stop_ids:
            self._constraint.accept(token_id)
        self.history.append(token_id)

    def rewind(self, tokens: int) -> None:
        """Go back in the grammar after the last ``tokens`` tokens were taken from the history.

        Raises:
            EngineError: If the grammar has not come that far.
        """
        self._forced.clear()
        if self._constraint is not None and tokens:
            self._constraint.rewind(tokens)

    def fork(self, seed: int) -> Sampler:
        """Return a sampler at the same place in the text with another seed."""
        twin = Sampler(
            self.params,
            self.history.copy(),
            stop_ids=self.stop_ids,
            seed=seed,
            vocab_size=self._vocab_size,
            words=self._words,
            hooks=Hooks(self._scorer, None if self._constraint is None else self._constraint.copy()),
        )
        twin._forced = deque(self._forced)
        return twin

    def sample(self, logits: Logits) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits: float32 [n], n >= vocab_size; not changed.

        Returns:
            The token id, and its log-probability if the request asked for log-probabilities.

        Raises:
            EngineError: If the model gave NaN or infinity.
            RequestError: If the options leave no token, or the scorer fails.
        """
        raw = logits[: self._vocab_size]
        if not math.isfinite(float(raw.max())):
            place = self.history.generated + 1
            raise EngineError(f"the model gave logits that are not finite, at generated token {place}")
        self._force_at_the_limit()
        if self._forced:
            token_id = self._forced.popleft()
        elif self._constraint is not None and self._constraint.complete:
            # A complete text ends, whatever min_tokens or a bias says.
            token_id = min(self.stop_ids)
        else:
            token_id = self._choose_or_force(raw)
        self.history.append(token_id)
        if self._constraint is not None and token_id not in self.stop_ids:
            self._constraint.accept(token_id)
        count = self.params.logprobs
        return token_id, None if count is None else log_probability(raw, token_id, count)

    def process(self, raw: Logits) -> Logits:
        """Return the logits after all rules; the same array where there are none.

        Raises:
            RequestError: If the scorer raised, gave NaN or another shape, or the rules leave no token.
        """
        if not self.processors and self._scorer is None and self._constraint is None:
            return raw
        logits = raw.copy()
        if self._scorer is not None:
            logits = self._score(logits)
        for processor in self.processors:
            processor(logits, self.history)
        if self._constraint is not None:
            self._constraint.mask(logits)
        if float(logits.max()) == -math.inf:
            raise RequestError(
                f"the request's options leave no token to draw, at generated token {self.history.generated + 1}",
                param=self.params.restricting or "scorer",
                hint="banned words, n-gram bans, logit_bias and a grammar can contradict each other",
            )
        return logits

    def _score(self, logits: Logits) -> Logits:
        assert self._scorer is not None
        try:
            returned = self._scorer(self.history.tokens, logits)
            scored = logits if returned is None else np.asarray(returned, dtype=np.float32)
        except Exception as error:  # the caller's own code, which must not take other requests down
            raise RequestError(f"the scorer raised {type(error).__name__}: {error}", param="scorer") from error
        if scored.shape != logits.shape:
            raise RequestError(
                f"the scorer returned shape {list(scored.shape)}, but must return {list(logits.shape)}", param="scorer"
            )
        if math.isnan(float(scored.max())):
            raise RequestError("the scorer returned NaN", param="scorer")
        return scored

    def _choose_or_force(self, raw: Logits) -> int:
        token_id = self._choose(self.process(raw))
        if token_id in self.stop_ids and self._words.forced:
            missing = self._words.missing(self.history)
            if missing:
                self._forced.extend(missing[0])
                return self._forced.popleft()
        return token_id

    def _force_at_the_limit(self) -> None:
        """Queue the missing forced words where the rest of ``limit`` only just holds them."""
        if self._forced or not self._words.forced:
            return
        left = self._words.limit - self.history.generated
        if left > sum(len(tokens) for _, tokens in self._words.forced):
            return
        missing = self._words.missing(self.history)
        if missing and left <= sum(map(len, missing)):
            for tokens in missing:
                self._forced.extend(tokens)

    def _choose(self, logits: Logits) -> int:
        params = self.params
        temperature = params.temperature or 0.0
        if temperature == 0.0 or params.top_k == 1:
            return int(logits.argmax())
        uniform = self._random.random()
        scaled = logits if temperature == 1.0 else logits / np.float32(temperature)
        candidates = self._truncate(scaled)
        if params.xtc_probability > 0.0 and self._random.random() < params.xtc_probability:
            if candidates is None:
                candidates = Candidates(np.arange(scaled.size, dtype=np.int64), scaled)
            candidates = exclude_top_choices(candidates, params.xtc_threshold)
        if candidates is None:
            return draw(scaled, uniform)
        return int(candidates.ids[draw(candidates.logits, uniform)])

    def _truncate(self, scaled: Logits) -> Candidates | None:
        """Return what top-k, top-p, min-p and typical-p leave of the tokens; None for all of them."""
        params = self.params
        top_k, top_p = params.top_k or 0, 1.0 if params.top_p is None else params.top_p
        min_p, mass = params.min_p or 0.0, 1.0 if params.typical_p is None else params.typical_p
        candidates: Candidates | None = None
        if 0 < top_k < scaled.size:
            candidates = top_candidates(scaled, top_k)
        if top_p < 1.0:
            candidates = keep_top_p(scaled, top_p) if candidates is None else cut_top_p(candidates, top_p)
        if min_p > 0.0:
            candidates = keep_min_p(scaled, min_p) if candidates is None else cut_min_p(candidates, min_p)
        if mass < 1.0:
            candidates = keep_typical(scaled, mass) if candidates is None else cut_typical(candidates, mass)
        return candidates
