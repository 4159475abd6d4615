"""One answer on its way through the scheduler: what was asked, what was generated, when.

A request for several answers, or for beams, begins as one sequence, which computes the prompt. Then it branches: each
answer, or each beam, becomes a sequence of its own in a slot of its own, and all of them share one ``Request``.
"""

from __future__ import annotations

import secrets

from lamplighter_agent.engine.detokenizer import StopStrings, StreamingDetokenizer
from lamplighter_agent.engine.events import (
    Choice,
    Event,
    FinishReason,
    TextDelta,
)
from lamplighter_agent.engine.params import MAX_SEED
from lamplighter_agent.engine.request import Request
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.speculation import Speculator
from lamplighter_agent.engine.truncation import Logits

_CONTEXT_TOKENS = 8


def chunk_length(remaining: int, most: int, stretch: int) -> int:
    """Return how many of ``remaining`` prompt tokens to compute next, at most ``most``.

    A chunk ends where windowed layers drop tokens, ``stretch`` tokens from here: a chunk across that place would find
    its keys in other rows than a chunk that begins or ends there, and add them up in another order. No single token is
    left for the end, nor before such a place: kernels for one row round otherwise than those for many. So the logits
    behind a prompt do not depend on how it was cut and what was cached of it.
    """
    length = min(most - 1 if remaining == most + 1 and most > 2 else min(remaining, most), stretch)
    return length - 1 if length < remaining and length == stretch - 1 and length > 2 else length


class Sequence:
    """One slot's part of a request that was accepted.

    Args:
        request: The request.
        sampler: Draws the tokens and knows those that end the text.
        index: Which of the request's answers this is.

    Attributes:
        prefilled: Tokens in the cache of those that it was given.
        generated: Tokens drawn so far.
        reserved: Cache tokens set aside for it.
        last_token: The token drawn last.
        slides: True if it goes on when its cache tokens are used up.
        keep: Leading tokens that are then kept.
        speculator: Guesses its tokens, once it decodes alone.
        guess: The next token, if it was guessed.
    """

    together = False
    """True if all sequences of the request end together."""

    def __init__(self, request: Request, sampler: Sampler, *, index: int = 0) -> None:
        params = request.params
        self.request = request
        self.sampler = sampler
        self.slides = params.on_context_full == "slide"
        self.keep = params.keep_tokens or 0
        self.prefilled = 0
        self.generated = 0
        self.reserved = 0
        self.last_token = -1
        self.speculator: Speculator | None = None
        self.guess: int | None = None
        self._input = request.prompt
        self._branched = self.width == 1
        self._index = index
        context = request.prompt[-_CONTEXT_TOKENS:] if params.echo else []
        self._detokenizer = StreamingDetokenizer(request.decoder, context=context)
        self._stops = StopStrings(params.stop)
        self._stop_string_met = False
        self._echoed = not params.echo

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.request.prompt

    @property
    def limit(self) -> int:
        """Tokens that it may generate at most."""
        return self.request.limit

    @property
    def width(self) -> int:
        """Slots that the request needs once its prompt is computed."""
        return self.request.params.n

    @property
    def slots(self) -> int:
        """Slots that must be there for it: its own, and those of the answers or beams that branch off later."""
        return 1 if self._branched else self.width

    @property
    def in_prefill(self) -> bool:
        """True until everything that it was given is computed."""
        return self.prefilled < len(self._input)

    @property
    def remaining(self) -> int:
        """Tokens that are to be computed before the next one can be drawn."""
        return len(self._input) - self.prefilled

    @property
    def cache_prompt(self) -> bool:
        """True if the prefix cache may serve it: not where the logits of the whole prompt are wanted."""
        return self.request.params.cache_prompt and not self.request.wants_prompt_logprobs

    def remaining_prompt(self, most: int, stretch: int) -> list[int]:
        """Return the next prompt tokens to compute; see ``chunk_length``."""
        length = chunk_length(self.remaining, most, stretch)
        return self._input[self.prefilled : self.prefilled + length]

    def compute_again(self, tokens: list[int], done: int) -> None:
        """Go back to prefill: ``tokens`` are to be in the cache, and the first ``done`` of them are."""
        self._input = tokens
        self.prefilled = done

    def branches(self) -> list[Sequence]:
        """Return the other answers or beams, the first time that the prompt is computed; none later."""
        others = [] if self._branched else self._make_branches()
        for other in (self, *others):
            other._branched = True
            other.prefilled = self.prefilled
        return others

    def take(self, logits: Logits, now: float) -> tuple[list[Event], FinishReason | None]:
        """Draw the next token.

        Args:
            logits: float32 [n]: what the model says behind the last token.
            now: Monotonic time.

        Returns:
            The new token with its text, nothing for a stop token; and why the answer is complete, None if it is not.

        Raises:
            EngineError: If the logits are not finite, or the options leave no token.
        """
        token_id, report = self.sampler.sample(logits)
        self.generated += 1
        self.last_token = token_id
        self.request.note_token(now)
        self.request.accepted += token_id == self.guess
        events: list[Event] = [] if self._echoed else [self.request.echo(self._index)]
        self._echoed = True
        if token_id in self.sampler.stop_ids:
            return events, "stop"
        text = self._detokenizer.push(token_id)
        if self.generated >= self.request.params.min_tokens:
            text, self._stop_string_met = self._stops.push(text)
        reports = None if report is None else (self.request.named(report),)
        events.append(TextDelta(self.request.id, text, (token_id,), reports, self._index))
        if self._stop_string_met:
            return events, "stop"
        return events, "length" if self.generated >= self.request.limit else None

    def finish(self, reason: FinishReason, now: float) -> list[Event]:
        """Return the closing event, with the text that was held back, if this was the request's last answer."""
        tail = ""
        if not self._stop_string_met:
            tail, met = self._stops.push(self._detokenizer.finish())
            tail += self._stops.finish()
            if met and reason == "length":
                reason = "stop"
        choice = Choice(
            index=self._index, finish_reason=reason, text_tail=tail, generated_tokens=self.generated, score=None
        )
        return self.request.close(choice, self.width if self._branched else 1, now, prefilled=self.prompt_prefilled)

    @property
    def prompt_prefilled(self) -> int:
        """Tokens of the prompt that are, or were, in the cache."""
        return len(self.prompt) if self.generated else self.prefilled

    def _make_branches(self) -> list[Sequence]:
        """Return the other answers; the seed of answer ``i`` is the request's plus ``i``."""
        seed = self.request.params.seed
        seeds = [
            secrets.randbits(63) if seed is None else (seed + index) % (MAX_SEED + 1) for index in range(1, self.width)
        ]
        return [
            Sequence(self.request, self.sampler.fork(seed), index=index) for index, seed in enumerate(seeds, start=1)
        ]
