"""What came of a request: one answer, or as many as it asked for, put together from the engine's events."""

from __future__ import annotations

import msgspec

from lamplighter_agent.engine.events import (
    Choice,
    Finished,
    FinishReason,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
)


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers to a request.

    Attributes:
        index: Which one.
        text: All of its text.
        tail: The part of it that no ``TextDelta`` brought.
        finish_reason: Why it ended.
        logprobs: Of each of its tokens, if the request asked for them.
        generated_tokens: Its length, a final stop token included.
        score: Of a beam.
    """

    index: int
    text: str
    tail: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    generated_tokens: int
    score: float | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a request.

    Attributes:
        alternatives: One answer, or as many as the request asked for.
        package: The package that answered, ``name/version``.
        embedding: The prompt's, if it was asked for.
    """

    alternatives: tuple[Alternative, ...]
    usage: Usage
    timings: Timings
    package: str
    embedding: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        """All text of the first answer."""
        return self.alternatives[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.alternatives[0].finish_reason


class Parts:
    """What came of the answers so far, by their index."""

    def __init__(self) -> None:
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}

    def add(self, event: TextDelta) -> None:
        """Take in a piece."""
        self._texts.setdefault(event.index, []).append(event.text)
        if event.logprobs is not None:
            self._logprobs.setdefault(event.index, []).extend(event.logprobs)

    def alternatives(self, event: Finished) -> tuple[Alternative, ...]:
        """Return all answers at the end of the request."""
        usage = event.usage.generated_tokens
        only = Choice(index=0, finish_reason=event.finish_reason, text_tail=event.text_tail, generated_tokens=usage)
        return tuple(
            Alternative(
                index=choice.index,
                text="".join(self._texts.get(choice.index, [])) + choice.text_tail,
                tail=choice.text_tail,
                finish_reason=choice.finish_reason,
                logprobs=tuple(self._logprobs[choice.index]) if choice.index in self._logprobs else None,
                generated_tokens=choice.generated_tokens,
                score=choice.score,
            )
            for choice in event.choices or (only,)
        )
