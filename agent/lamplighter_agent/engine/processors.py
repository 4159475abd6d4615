"""Rules that change logits by what was said before. Each works in place on float32 logits of shape [vocab_size].

``make_processors`` puts them in their order: repetition penalty, presence and frequency penalties, DRY, logit bias,
no-repeat n-grams, banned words, the ban of early stops. Penalties come before bans, so that nothing can lift a ban.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.history import History, TokenIds
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.truncation import Logits

_LONGEST_DRY_MATCH: Final = 64
"""Longer repetitions count as this long: the penalty is beyond every logit by then."""

_LARGEST_PENALTY: Final = 1e30
"""Keeps float32 finite, so that a penalized token stays possible where all others are banned."""


class Processor(Protocol):
    """A rule of one request."""

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits of the token behind the history, in place."""


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens in prompt or text (Keskar et al. 2019)."""

    penalty: float

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        seen = history.seen()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / self.penalty, values * self.penalty)


@dataclass(frozen=True, slots=True)
class CountPenalties:
    """Subtracts ``presence + frequency * count`` from the logits of generated tokens, as OpenAI's API defines it."""

    presence: float
    frequency: float

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        ids, counts = history.counts()
        logits[ids] -= self.presence + self.frequency * counts


@dataclass(frozen=True, slots=True)
class DryPenalty:
    """DRY, don't repeat yourself (oobabooga/text-generation-webui pull request 5677).

    A token that would lengthen a repetition of ``n`` tokens, ``n >= allowed_length``, loses
    ``multiplier * base ** (n - allowed_length)``. Repetitions do not reach across a breaker.

    Attributes:
        multiplier: Strength.
        base: Growth by token.
        allowed_length: Repetitions shorter than this are free.
        is_breaker: Tells of a token whether it ends a repetition.
    """

    multiplier: float
    base: float
    allowed_length: int
    is_breaker: Callable[[int], bool]

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        tokens = history.tokens
        last = tokens.size - 1
        if last < 1 or self.is_breaker(int(tokens[last])):
            return
        ends = np.flatnonzero(tokens[:last] == tokens[last])
        lengths = np.ones(ends.size, dtype=np.int64)
        alive = np.arange(ends.size)
        for back in range(1, min(_LONGEST_DRY_MATCH, last)):
            if self.is_breaker(int(tokens[last - back])):
                break
            starts = ends[alive] - back
            alive = alive[(starts >= 0) & (tokens[np.maximum(starts, 0)] == tokens[last - back])]
            if not alive.size:
                break
            lengths[alive] += 1
        long_enough = lengths >= self.allowed_length
        followers, lengths = tokens[ends[long_enough] + 1], lengths[long_enough]
        # Where a token follows several repetitions the longest counts: of equal indices numpy keeps the last value.
        order = np.argsort(lengths, kind="stable")
        followers, beyond = followers[order], (lengths[order] - self.allowed_length).astype(np.float64)
        penalties = np.minimum(self.multiplier * self.base**beyond, _LARGEST_PENALTY)
        logits[followers] = logits[followers] - penalties.astype(np.float32)


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Adds ``values`` float32 [n] to the logits of ``ids`` int64 [n]."""

    ids: TokenIds
    values: NDArray[np.float32]

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        del history
        logits[self.ids] += self.values


@dataclass(frozen=True, slots=True)
class NoRepeatNgram:
    """Bans every token that would complete an n-gram of ``size`` tokens that occurred before."""

    size: int

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        tokens, prefix = history.tokens, self.size - 1
        if tokens.size < self.size:
            return
        followers = tokens[prefix:]
        matches = np.ones(followers.size, dtype=np.bool_)
        for place in range(prefix):
            matches &= tokens[place : place + followers.size] == tokens[tokens.size - prefix + place]
        logits[followers[matches]] = -np.inf


@dataclass(frozen=True, slots=True)
class BannedSequences:
    """Bans the last token of each sequence whose other tokens stand at the end of the history."""

    sequences: tuple[tuple[int, ...], ...]

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        ending = tuple(history.tokens[-max(len(sequence) for sequence in self.sequences) :].tolist())
        for sequence in self.sequences:
            prefix = sequence[:-1]
            if not prefix or ending[-len(prefix) :] == prefix:
                logits[sequence[-1]] = -np.inf


@dataclass(frozen=True, slots=True)
class NoEarlyStop:
    """Bans the stop tokens ``ids`` int64 [n] until ``min_tokens`` tokens were generated."""

    ids: TokenIds
    min_tokens: int

    def __call__(self, logits: Logits, history: History) -> None:
        """Change the logits in place."""
        if history.generated < self.min_tokens:
            logits[self.ids] = -np.inf


def make_processors(
    params: GenerationParams,
    *,
    stop_ids: frozenset[int],
    banned: tuple[tuple[int, ...], ...] = (),
    is_breaker: Callable[[int], bool] = lambda token_id: False,
) -> tuple[Processor, ...]:
    """Return the rules that options ask for, in the order of the module's docstring.

    Args:
        params: Options with the package's defaults filled in.
        stop_ids: Tokens that end the text.
        banned: Token sequences of ``banned_words``.
        is_breaker: Tells of a token whether it holds one of ``dry_sequence_breakers``.
    """
    found: list[Processor] = []
    if params.repetition_penalty not in {None, 1.0}:
        found.append(RepetitionPenalty(params.repetition_penalty or 1.0))
    if params.presence_penalty or params.frequency_penalty:
        found.append(CountPenalties(params.presence_penalty, params.frequency_penalty))
    if params.dry_multiplier:
        found.append(DryPenalty(params.dry_multiplier, params.dry_base, params.dry_allowed_length, is_breaker))
    if params.logit_bias:
        ids = np.array(list(params.logit_bias), dtype=np.int64)
        found.append(LogitBias(ids, np.array(list(params.logit_bias.values()), dtype=np.float32)))
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNgram(params.no_repeat_ngram_size))
    if banned:
        found.append(BannedSequences(banned))
    if params.min_tokens and stop_ids:
        found.append(NoEarlyStop(np.array(sorted(stop_ids), dtype=np.int64), params.min_tokens))
    return tuple(found)
