"""Answers in OpenAI's shapes, whole and in chunks; no IO."""

from __future__ import annotations

import binascii
import struct
import time
from typing import Final

import msgspec

from lamplighter_agent.engine.events import FinishReason, TextDelta, TokenLogprob, Usage
from lamplighter_agent.service.answers import Alternative, Answer
from lamplighter_agent.service.openai_format import JsonObject

_FINISH: Final[dict[FinishReason, str]] = {
    "stop": "stop",
    "length": "length",
    "deadline": "length",
    "cancelled": "stop",
    "error": "stop",
}
_LEAST_LOGPROB: Final = -9999.0
"""Written for minus infinity, which JSON does not have; OpenAI's own word for a very unlikely token."""


class Answering(msgspec.Struct, frozen=True, kw_only=True):
    """What every object of one answer repeats.

    Attributes:
        id: Name of the answer.
        model: The package, ``name/version``.
        chat: True for ``/v1/chat/completions``, False for ``/v1/completions``.
        created: Unix time, whole seconds.
    """

    id: str
    model: str
    chat: bool
    created: int = msgspec.field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> JsonObject:
        """Return an answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, [self._choice(one) for one in answer.alternatives], answer.usage)

    def first(self, index: int) -> JsonObject:
        """Return the chunk that opens a streamed chat answer."""
        return self._chunk({"role": "assistant", "content": ""}, "", index)

    def piece(self, event: TextDelta) -> JsonObject:
        """Return a chunk of text with its tokens' log-probabilities, if there are any."""
        return self._chunk({"content": event.text}, event.text, event.index, logprobs=self._logprobs(event.logprobs))

    def tail(self, alternative: Alternative) -> JsonObject:
        """Return the chunk of the text that was held back."""
        return self._chunk({"content": alternative.tail}, alternative.tail, alternative.index)

    def last(self, alternative: Alternative) -> JsonObject:
        """Return the chunk that says why an answer ended."""
        return self._chunk({}, "", alternative.index, finish_reason=_FINISH[alternative.finish_reason])

    def usage(self, usage: Usage) -> JsonObject:
        """Return the chunk with the numbers of tokens, which comes last when asked for."""
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [], usage)

    def _choice(self, one: Alternative) -> JsonObject:
        choice: JsonObject = {
            "index": one.index,
            "finish_reason": _FINISH[one.finish_reason],
            "logprobs": self._logprobs(one.logprobs),
        }
        if self.chat:
            choice["message"] = {"role": "assistant", "content": one.text, "refusal": None}
        else:
            choice["text"] = one.text
        if one.score is not None:
            choice["score"] = one.score
        return choice

    def _chunk(
        self,
        delta: JsonObject,
        text: str,
        index: int,
        *,
        finish_reason: str | None = None,
        logprobs: JsonObject | None = None,
    ) -> JsonObject:
        choice: JsonObject = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
        if self.chat:
            choice["delta"] = delta
        else:
            choice["text"] = text
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice], None)

    def _object(self, kind: str, choices: list[JsonObject], usage: Usage | None) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": None if usage is None else _usage(usage),
        }

    def _logprobs(self, reports: tuple[TokenLogprob, ...] | None) -> JsonObject | None:
        if reports is None:
            return None
        return _chat_logprobs(reports) if self.chat else _completion_logprobs(reports)


def embeddings(answers: list[Answer], *, model: str, base64: bool) -> JsonObject:
    """Return the answer of ``/v1/embeddings``: numbers, or with ``base64`` their little-endian float32 bytes in it."""
    data: list[JsonObject] = []
    for index, answer in enumerate(answers):
        vector: object = answer.embedding
        if base64:
            packed = struct.pack(f"<{len(answer.embedding or ())}f", *(answer.embedding or ()))
            vector = binascii.b2a_base64(packed, newline=False).decode("ascii")
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(answer.usage.prompt_tokens for answer in answers)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _chat_logprobs(reports: tuple[TokenLogprob, ...]) -> JsonObject:
    content: list[JsonObject] = []
    for report in reports:
        top = zip(report.top_texts, report.top, strict=True)
        entry = _token(report.text, report.logprob)
        entry["top_logprobs"] = [_token(text, logprob) for text, (_, logprob) in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _completion_logprobs(reports: tuple[TokenLogprob, ...]) -> JsonObject:
    """Return the older shape; offsets count characters from the first of these tokens."""
    offsets, offset = [], 0
    for report in reports:
        offsets.append(offset)
        offset += len(report.text)
    return {
        "tokens": [report.text for report in reports],
        "token_logprobs": [None if report.logprob is None else _finite(report.logprob) for report in reports],
        "top_logprobs": [
            None
            if report.logprob is None
            else {text: _finite(logprob) for text, (_, logprob) in zip(report.top_texts, report.top, strict=True)}
            for report in reports
        ],
        "text_offset": offsets,
    }


def _token(text: str, logprob: float | None) -> JsonObject:
    # U+FFFD stands for a part of a character, whose bytes are not known here.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(0.0 if logprob is None else logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _usage(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
