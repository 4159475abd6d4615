"""One answer on its way through the scheduler: what was asked, what was generated, when.

A request for several answers, or for beams, begins as one sequence, which computes the prompt. Then it branches: each
answer, or each beam, becomes a sequence of its own in a slot of its own, and all of them share one ``Request``.
"""

from __future__ import annotations

import secrets

import msgspec

from lamplighter_agent.engine.beam import BeamSearch, Hypothesis, place_beams
from lamplighter_agent.engine.detokenizer import StopStrings, StreamingDetokenizer, TextCodec
from lamplighter_agent.engine.events import (
    Choice,
    Event,
    Finished,
    FinishReason,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
)
from lamplighter_agent.engine.params import MAX_SEED, GenerationParams
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.speculation import Speculator
from lamplighter_agent.engine.truncation import Logits, log_probability

_CONTEXT_TOKENS = 8


def chunk_length(remaining: int, most: int) -> int:
    """Return how many of ``remaining`` prompt tokens to compute next, at most ``most``.

    No single token is left for the end: kernels for one row round otherwise than those for many, which all agree.
    So the logits behind a prompt are the same to the last bit however it was cut and whatever was cached of it.
    """
    return most - 1 if remaining == most + 1 and most > 2 else min(remaining, most)


class Request:
    """What all answers of a request share: the times, and the answers that have ended.

    Args:
        request_id: Its id.
        prompt: Token ids of the prompt.
        params: Options with the package's defaults filled in.
        limit: Tokens that each answer may have at most.
        decoder: Turns tokens into text.
        submitted_s: Monotonic time of its submission.

    Attributes:
        cached: Prompt tokens that were in the cache before and not computed.
        started_s: Monotonic time at which it got a slot.
        drafted: Tokens that were guessed.
        accepted: Those of them that were drawn then.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: GenerationParams,
        *,
        limit: int,
        decoder: TextCodec,
        submitted_s: float,
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.limit = limit
        self.decoder = decoder
        self.cached = 0
        self.drafted = 0
        self.accepted = 0
        self.started_s = submitted_s
        self._submitted_s = submitted_s
        self._started = False
        self._first_token_s: float | None = None
        self._last_token_s = submitted_s
        self._choices: dict[int, Choice] = {}
        self._prompt_logprobs: list[TokenLogprob] = []

    def start(self, now: float) -> None:
        """Note that the request got a slot."""
        self.started_s = now
        self._started = True

    def note_token(self, now: float) -> None:
        """Note that a token was drawn."""
        self._last_token_s = now
        if self._first_token_s is None:
            self._first_token_s = now

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if the logits behind every token of the prompt are needed."""
        return self.params.echo and self.params.logprobs is not None

    def note_prompt_logits(self, rows: Logits, vocab_size: int) -> None:
        """Take the logits [n, width] behind the next ``n`` tokens of the prompt."""
        count = self.params.logprobs or 0
        for row, token_id in zip(rows, self.prompt[len(self._prompt_logprobs) + 1 :], strict=False):
            self._prompt_logprobs.append(self.named(log_probability(row[:vocab_size], token_id, count)))

    def echo(self, index: int) -> TextDelta:
        """Return the prompt as the beginning of an answer."""
        reports = None
        if self.wants_prompt_logprobs:
            reports = (self.named(TokenLogprob(self.prompt[0], None)), *self._prompt_logprobs)
        return TextDelta(self.id, self.decoder.decode(self.prompt), tuple(self.prompt), reports, index, echo=True)

    def named(self, report: TokenLogprob) -> TokenLogprob:
        """Return a report with the texts of its tokens."""
        text_of = self.decoder.token_text
        texts = tuple(text_of(token_id) for token_id, _ in report.top)
        return msgspec.structs.replace(report, text=text_of(report.token_id), top_texts=texts)

    def close(self, choice: Choice, answers: int, now: float, *, prefilled: int) -> list[Event]:
        """Take the end of an answer; return the end of the request if it is the last of ``answers``.

        Args:
            choice: The answer.
            answers: How many the request has.
            now: Monotonic time.
            prefilled: Prompt tokens in the cache.
        """
        self._choices[choice.index] = choice
        if len(self._choices) < answers:
            return []
        choices = tuple(self._choices[index] for index in sorted(self._choices))
        generated = sum(one.generated_tokens for one in choices)
        several = self.params.n > 1 or self.params.num_beams > 1
        first = choices[0]
        usage = Usage(prompt_tokens=len(self.prompt), cached_tokens=self.cached, generated_tokens=generated)
        timings = self._timings(now, max(generated - answers, 0), prefilled)
        ends = choices if several else ()
        return [Finished(self.id, first.finish_reason, first.text_tail, usage, timings, ends)]

    def _timings(self, now: float, decoded: int, prefilled: int) -> Timings:
        started = self.started_s if self._started else now
        first = now if self._first_token_s is None else self._first_token_s
        prefill_s = first - started
        decode_s = max(self._last_token_s - first, 0.0)
        return Timings(
            queue_s=started - self._submitted_s,
            prefill_s=prefill_s,
            first_token_s=first - self._submitted_s,
            decode_s=decode_s,
            prompt_tokens_per_s=(prefilled - self.cached) / prefill_s if prefill_s > 0 else 0.0,
            generated_tokens_per_s=decoded / decode_s if decode_s > 0 else 0.0,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )


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

    def remaining_prompt(self, most: int) -> list[int]:
        """Return the next prompt tokens to compute, at most ``most``."""
        length = chunk_length(self.remaining, most)
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


class BeamSequence(Sequence):
    """One beam. All beams of a request are taken a step further, and end, together.

    Args:
        request: The request.
        sampler: Knows rules and stop tokens.
        vocab_size: Tokens that may occur.
        leader: The beam that computed the prompt, None for that one itself.
    """

    together = True

    def __init__(
        self, request: Request, sampler: Sampler, *, vocab_size: int, leader: BeamSequence | None = None
    ) -> None:
        super().__init__(request, sampler)
        self._vocab_size = vocab_size
        self._leader = self if leader is None else leader
        self._beams: list[BeamSequence] = [self]
        self._search: BeamSearch = self._make_search() if leader is None else leader._search

    def _make_search(self) -> BeamSearch:
        params, sampler = self.request.params, self.sampler
        return BeamSearch(
            params.num_beams,
            sampler.history,
            limit=self.request.limit,
            stop_ids=sampler.stop_ids,
            length_penalty=1.0 if params.length_penalty is None else params.length_penalty,
            early_stopping=params.early_stopping or False,
            processors=sampler.processors,
            ends_text=self._ends_text,
        )

    @property
    def width(self) -> int:
        """Slots that the request needs once its prompt is computed."""
        return self.request.params.num_beams

    @property
    def cache_prompt(self) -> bool:
        """True if the prefix cache may serve it: of all beams the first."""
        return super().cache_prompt and self.leads

    @property
    def leads(self) -> bool:
        """True for the one beam that stands for all."""
        return self._leader is self

    def take_beams(
        self, logits: dict[Sequence, Logits], now: float
    ) -> tuple[list[tuple[Sequence, Sequence]], FinishReason | None]:
        """Take all beams of the request a token further; the leader does.

        Args:
            logits: float32 [n] behind the last token of each beam.
            now: Monotonic time.

        Returns:
            Which beams' cache rows must be copied over which others', and "stop" once the search is over.

        Raises:
            EngineError: If logits are not finite.
        """
        search, beams = self._search, self._beams
        parents, tokens = search.step([logits[beam] for beam in beams], self._vocab_size)
        self.request.note_token(now)
        rows, copies = place_beams(list(range(len(beams))), parents)
        moves: list[tuple[Sequence, Sequence]] = [(beams[source], beams[target]) for source, target in copies]
        self._beams = [beams[row] for row in rows]
        for beam, token_id in zip(self._beams, tokens, strict=True):
            beam.last_token = token_id
            beam.generated = search.generated
        return moves, "stop" if search.done else None

    def finish(self, reason: FinishReason, now: float) -> list[Event]:
        """Return the best texts and the closing event."""
        found = self._search.best(self.request.params.n) if self.generated else []
        events: list[Event] = []
        for index, hypothesis in enumerate(found):
            text, tokens = self._text(hypothesis)
            events.append(TextDelta(self.request.id, text, tokens, index=index))
            ended: FinishReason = "stop" if hypothesis.complete else "length" if reason == "stop" else reason
            choice = Choice(
                index=index,
                finish_reason=ended,
                text_tail="",
                generated_tokens=len(hypothesis.tokens),
                score=hypothesis.score,
            )
            events += self.request.close(choice, len(found), now, prefilled=self.prompt_prefilled)
        if not found:
            choice = Choice(index=0, finish_reason=reason, text_tail="", generated_tokens=0)
            events += self.request.close(choice, 1, now, prefilled=self.prompt_prefilled)
        return events

    def _make_branches(self) -> list[Sequence]:
        others = [
            BeamSequence(self.request, self.sampler, vocab_size=self._vocab_size, leader=self)
            for _ in range(1, self.width)
        ]
        self._beams += others
        return list(others)

    def _text(self, hypothesis: Hypothesis) -> tuple[str, tuple[int, ...]]:
        tokens = hypothesis.tokens
        if tokens and tokens[-1] in self.sampler.stop_ids:
            tokens = tokens[:-1]
        stops = StopStrings(self.request.params.stop)
        text, met = stops.push(self.request.decoder.decode(list(tokens)))
        return text if met else text + stops.finish(), tokens

    def _ends_text(self, tokens: list[int]) -> bool:
        params = self.request.params
        if not params.stop or len(tokens) < params.min_tokens:
            return False
        text = self.request.decoder.decode(tokens)
        return any(stop in text for stop in params.stop)
