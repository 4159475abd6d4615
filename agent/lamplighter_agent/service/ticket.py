"""A request from its acceptance to its end: what a transport hands in, and what it reads of the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.worker import EngineWorker
from lamplighter_agent.service.worker_messages import Prompt

MAX_UNREAD: Final = 4096
"""Pieces of an answer, of a token or more, that may wait for a reader who is slower than the engine."""


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as transports hand it in.

    Attributes:
        id: The asker's name for it.
        sender: Where the answer goes; ids of different senders are unrelated.
        client: Who asked, for the limit on how much one may ask; None: the sender.
        prompt: What to answer.
        params: Generation options, without a deadline.
        model: ``name`` or ``name/version`` that must be the active package; None or ``default`` takes any.
        deadline_s: Seconds from now within which it must be finished, or None for the configured time.
        embed: Not an answer is wanted but the prompt's embedding.
        idempotent: Answer the same id of the same sender only once until its deadline is over.
        is_part: It belongs to what one request asked for and has been counted against the client's limit.
    """

    id: str
    sender: str
    client: str | None = None
    prompt: Prompt
    params: GenerationParams
    model: str | None = None
    deadline_s: float | None = None
    embed: bool = False
    idempotent: bool = False
    is_part: bool = False


Event: TypeAlias = TextDelta | Answer


class Ticket:
    """An accepted request. Iterate it to its end, or call ``cancel`` when the asker has left.

    Args:
        request: What is asked.
        number: Its name at the worker.
        cancel: Ends it.
    """

    def __init__(self, request: GenerationRequest, number: str, cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self.number = number
        self.arrived_s = time.monotonic()
        self.worker: EngineWorker | None = None
        self.cancelled = False
        self._cancel = cancel
        self._events: asyncio.Queue[Event | LamplighterError] = asyncio.Queue()
        self._over = False
        self._given_up = False

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Event:
        """Return the next event.

        Raises:
            RequestError: If the request was refused late, expired (408), or was cancelled while it waited or because
                its pieces were left unread (499).
            EngineError: If the engine failed or was lost.
        """
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._over = not isinstance(event, TextDelta)
        if isinstance(event, LamplighterError):
            raise event
        return event

    def cancel(self) -> None:
        """End the request; without effect once it is over."""
        self._cancel(self)

    def put(self, event: Event | LamplighterError) -> None:
        """Hand an event to the reader; one that leaves too many unread loses its request, not the agent its memory."""
        if self._given_up:
            return
        if isinstance(event, TextDelta) and self._events.qsize() >= MAX_UNREAD:
            self._given_up = True
            self.cancel()
            event = RequestError(f"{MAX_UNREAD} pieces of the answer were left unread", code=499)
        self._events.put_nowait(event)
