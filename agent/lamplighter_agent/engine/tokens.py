"""What ``Engine.generate`` gives: its steps, and the iterator over them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Self

import msgspec

from lamplighter_agent.engine.events import Finished, TextDelta, TokenLogprob


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A step of ``Engine.generate``.

    Attributes:
        text: Text that became certain, perhaps empty: the texts of one ``index`` join to its whole text.
        token_ids: The new tokens: one, or with ``echo`` those of the prompt, or with ``num_beams`` those of a beam.
        logprobs: Of each token, if the request asked for them.
        index: Which of the request's answers goes on.
        echo: True where this is the prompt.
        finished: How it ended, in the last item only.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    echo: bool = False
    finished: Finished | None = None

    @classmethod
    def of(cls, event: TextDelta) -> Self:
        """Return what the scheduler reports as a step."""
        return cls(
            text=event.text,
            token_ids=event.token_ids,
            logprobs=event.logprobs or (),
            index=event.index,
            echo=event.echo,
        )

    @property
    def token_id(self) -> int | None:
        """The one new token; None in the last item."""
        return self.token_ids[0] if self.token_ids else None

    @property
    def logprob(self) -> TokenLogprob | None:
        """Its log-probability, if the request asked for it."""
        return self.logprobs[0] if self.logprobs else None


class Generation(Iterator[Token]):
    """The tokens of one request. Closing or dropping it ends the request, begun or not.

    Args:
        tokens: Where they come from.
        end: Ends the request; again without effect.
    """

    def __init__(self, tokens: Generator[Token], end: Callable[[], None]) -> None:
        self._tokens = tokens
        self._end = end

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the request."""
        self._tokens.close()
        # A generator that was never asked for anything does not run its own clean-up.
        self._end()

    def __del__(self) -> None:
        self.close()
