"""What the scheduler reports. Pure msgspec structs, tagged, so that they cross the worker's pipe as they are."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability (nats) of a token under the model, before temperature and truncation.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its log-probability.
        top: The most likely tokens with theirs, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Prompt tokens that were not computed again.
        generated_tokens: Tokens drawn, a final stop token included.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in seconds and rates; a rate is 0 where nothing was measured.

    Attributes:
        queue_s: From submission to a slot.
        prefill_s: From the slot to the end of the prompt, other requests' steps in between included.
        first_token_s: From submission to the first token.
        decode_s: From the first token to the last.
        prompt_tokens_per_s: Prompt tokens computed, by ``prefill_s``.
        generated_tokens_per_s: Tokens after the first, by ``decode_s``.
    """

    queue_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float


class TextDelta(msgspec.Struct, frozen=True, tag=True):
    """New tokens of a request and the text that became certain with them (often, not always, theirs)."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of a request; ``text_tail`` is text that was held back until now."""

    request_id: str
    finish_reason: FinishReason
    text_tail: str
    usage: Usage
    timings: Timings


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of a request that this machine could not serve; ``reason`` is that of the error tree."""

    request_id: str
    reason: str
    message: str


Event: TypeAlias = TextDelta | Finished | Failed
