"""What the scheduler reports. Pure msgspec structs, tagged, so that they cross the worker's pipe as they are."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability (nats) of a token under the model, before all rules and truncation.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its log-probability; None for the first token of an echoed prompt, which nothing comes before.
        top: The most likely tokens with theirs, most likely first.
        text: The text of the token; bytes that are no text show as U+FFFD.
        top_texts: The texts of ``top``.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""
    top_texts: tuple[str, ...] = ()


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
        drafted_tokens: Tokens that speculation guessed.
        accepted_tokens: Those of them that became part of the text.
    """

    queue_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class TextDelta(msgspec.Struct, frozen=True, tag=True):
    """New tokens of a request and the text that became certain with them (often, not always, theirs).

    Attributes:
        request_id: The request.
        text: New text of the answer.
        token_ids: The new tokens.
        logprobs: Of each token, if the request asked for them.
        index: Which of the request's answers goes on.
        echo: True where this is the prompt, which ``echo`` asks for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    echo: bool = False


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one of several answers.

    Attributes:
        index: Which one.
        finish_reason: Why it ended.
        text_tail: Text that was held back until now.
        generated_tokens: Tokens drawn for it.
        score: Of a beam: sum of log-probabilities by length to the power of the length penalty.
    """

    index: int
    finish_reason: FinishReason
    text_tail: str
    generated_tokens: int
    score: float | None = None


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of a request.

    Attributes:
        request_id: The request.
        finish_reason: Why its first answer ended.
        text_tail: Text of the first answer that was held back until now.
        usage: Tokens of all answers together.
        timings: Up to the end of the last answer.
        choices: The ends of all answers, where the request asked for several or for beams.
        embedding: What a request for an embedding gets, float values of unit length.
    """

    request_id: str
    finish_reason: FinishReason
    text_tail: str
    usage: Usage
    timings: Timings
    choices: tuple[Choice, ...] = ()
    embedding: tuple[float, ...] | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of a request that could not be served; ``reason`` is that of the error tree.

    ``code`` and ``param`` are those of a ``RequestError``, where the request's own options are at fault.
    """

    request_id: str
    reason: str
    message: str
    hint: str | None = None
    code: int | None = None
    param: str | None = None


Event: TypeAlias = TextDelta | Finished | Failed
