"""One request on its way through the scheduler: what was asked, what was generated, when."""

from __future__ import annotations

from lamplighter_agent.engine.detokenizer import Decoder, StopStrings, StreamingDetokenizer
from lamplighter_agent.engine.events import Finished, FinishReason, TextDelta, Timings, Usage
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.truncation import Logits


def chunk_length(remaining: int, most: int) -> int:
    """Return how many of ``remaining`` prompt tokens to compute next, at most ``most``.

    No single token is left for the end: kernels for one row round otherwise than those for many, which all agree.
    So the logits behind a prompt are the same to the last bit however it was cut and whatever was cached of it.
    """
    return most - 1 if remaining == most + 1 and most > 2 else min(remaining, most)


class Sequence:
    """A request that was accepted.

    Args:
        request_id: Its id.
        prompt: Token ids of the prompt.
        params: Options with the package's defaults filled in.
        sampler: Draws its tokens and knows those that end it.
        limit: Tokens that it may generate at most.
        decoder: Turns tokens into text.
        submitted_s: Monotonic time of its submission.

    Attributes:
        prefilled: Prompt tokens in the cache so far.
        cached: Those of them that were there before and not computed.
        generated: Tokens drawn so far.
        reserved: Cache tokens set aside for it.
        slides: True if it goes on when its cache tokens are used up.
        keep: Leading tokens that are then kept.
        started_s: Monotonic time at which it got a slot.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: GenerationParams,
        *,
        sampler: Sampler,
        limit: int,
        decoder: Decoder,
        submitted_s: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self._input = prompt
        self.limit = limit
        self.deadline_s = params.deadline_s
        self.cache_prompt = params.cache_prompt
        self.slides = params.on_context_full == "slide"
        self.keep = params.keep_tokens or 0
        self.open_ended = params.max_tokens is None
        self.prefilled = 0
        self.cached = 0
        self.generated = 0
        self.reserved = 0
        self.last_token = -1
        self._min_tokens = params.min_tokens
        self._sampler = sampler
        self._detokenizer = StreamingDetokenizer(decoder)
        self._stops = StopStrings(params.stop)
        self._stop_string_met = False
        self._submitted_s = submitted_s
        self.started_s = submitted_s
        self._started = False
        self._first_token_s: float | None = None
        self._last_token_s = submitted_s

    def start(self, now: float) -> None:
        """Note that the request got a slot."""
        self.started_s = now
        self._started = True

    def reuse(self, tokens: int) -> None:
        """Note that the first ``tokens`` tokens of the prompt are in the cache already."""
        self.prefilled = self.cached = tokens

    def remaining_prompt(self, most: int) -> list[int]:
        """Return the next prompt tokens to compute, at most ``most``."""
        length = chunk_length(len(self._input) - self.prefilled, most)
        return self._input[self.prefilled : self.prefilled + length]

    @property
    def remaining(self) -> int:
        """Tokens that are to be computed before the next one can be drawn."""
        return len(self._input) - self.prefilled

    def compute_again(self, tokens: list[int], done: int) -> None:
        """Go back to prefill: ``tokens`` are to be in the cache, and the first ``done`` of them are."""
        self._input = tokens
        self.prefilled = done

    @property
    def in_prefill(self) -> bool:
        """True until everything that it was given is computed."""
        return self.prefilled < len(self._input)

    def take(self, logits: Logits, now: float) -> tuple[TextDelta | None, FinishReason | None]:
        """Draw the next token.

        Args:
            logits: float32 [n]: what the model says behind the last token.
            now: Monotonic time.

        Returns:
            The new token with its text, None for a stop token; and why the request is complete, None if it is not.

        Raises:
            EngineError: If the logits are not finite.
        """
        token_id, report = self._sampler.sample(logits)
        self.generated += 1
        self.last_token = token_id
        self._last_token_s = now
        if self._first_token_s is None:
            self._first_token_s = now
        if token_id in self._sampler.stop_ids:
            return None, "stop"
        text = self._detokenizer.push(token_id)
        if self.generated >= self._min_tokens:
            text, self._stop_string_met = self._stops.push(text)
        delta = TextDelta(self.request_id, text, (token_id,), None if report is None else (report,))
        if self._stop_string_met:
            return delta, "stop"
        return delta, "length" if self.generated >= self.limit else None

    def finish(self, reason: FinishReason, now: float) -> Finished:
        """Return the closing event, with the text that was held back."""
        tail = ""
        if not self._stop_string_met:
            tail, met = self._stops.push(self._detokenizer.finish())
            tail += self._stops.finish()
            if met and reason == "length":
                reason = "stop"
        return Finished(self.request_id, reason, tail, self._usage(), self._timings(now))

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt), cached_tokens=self.cached, generated_tokens=self.generated)

    def _timings(self, now: float) -> Timings:
        started = self.started_s if self._started else now
        first = now if self._first_token_s is None else self._first_token_s
        prefill_s = first - started
        computed = (self.prefilled if self._first_token_s is None else len(self.prompt)) - self.cached
        decode_s = max(self._last_token_s - first, 0.0)
        return Timings(
            queue_s=started - self._submitted_s,
            prefill_s=prefill_s,
            first_token_s=first - self._submitted_s,
            decode_s=decode_s,
            prompt_tokens_per_s=computed / prefill_s if prefill_s > 0 else 0.0,
            generated_tokens_per_s=(self.generated - 1) / decode_s if decode_s > 0 else 0.0,
        )
