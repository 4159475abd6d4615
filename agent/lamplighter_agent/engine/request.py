"""What all answers of one request share: what was asked, the times, and the answers that have ended."""

from __future__ import annotations

import msgspec

from lamplighter_agent.engine.detokenizer import TextCodec
from lamplighter_agent.engine.events import Choice, Event, Finished, TextDelta, Timings, TokenLogprob, Usage
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.truncation import Logits, log_probability


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
