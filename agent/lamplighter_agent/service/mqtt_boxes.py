"""What waits between the network thread and the event loop, in both directions; bounded, and safe between threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from lamplighter_agent.service.mqtt_types import Incoming, Outgoing

logger = logging.getLogger(__name__)

MAX_OUTBOX: Final = 1024
MAX_INBOX: Final = 256
_BATCH: Final = 8


class Outbox:
    """Messages that are to leave.

    Attributes:
        dropped: Messages that found no room, or with QoS 0 no connection.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._lock = threading.Lock()
        self._messages: deque[Outgoing] = deque()
        self._urgent: deque[Outgoing] = deque()

    def __len__(self) -> int:
        return len(self._messages) + len(self._urgent)

    @property
    def crowded(self) -> bool:
        """True while so much waits that no more prompts should come: each of them has an answer."""
        return len(self._messages) > MAX_OUTBOX // 4

    def put(self, message: Outgoing) -> bool:
        """Take a message, or count it as dropped when there is no room."""
        with self._lock:
            lane = self._lane(message)
            if len(lane) >= MAX_OUTBOX:
                self.dropped += 1
                return False
            lane.append(message)
            return True

    def drop(self) -> None:
        """Count a message that was not even offered."""
        with self._lock:
            self.dropped += 1

    def take(self, *, only_unacknowledged: bool) -> Outgoing | None:
        """Return the next message, or None if there is none; with ``only_unacknowledged`` if it is one of QoS 0."""
        with self._lock:
            lane = self._urgent or self._messages
            if not lane or (only_unacknowledged and lane[0].qos > 0):
                return None
            return lane.popleft()

    def put_back(self, message: Outgoing) -> None:
        """Put a message back to the front."""
        with self._lock:
            self._lane(message).appendleft(message)

    def forget_unacknowledged(self) -> None:
        """Drop what nobody keeps for a later connection: messages of QoS 0."""
        with self._lock:
            before = len(self)
            self._messages, self._urgent = (
                deque(message for message in lane if message.qos > 0) for lane in (self._messages, self._urgent)
            )
            self.dropped += before - len(self)

    def _lane(self, message: Outgoing) -> deque[Outgoing]:
        return self._urgent if message.urgent else self._messages


class Receipt(NamedTuple):
    """What is told the broker when a message has been handled: its number, which counts on one connection only."""

    attempt: int
    number: int


class Inbox:
    """Messages that came, handed to the event loop a few at a time, so that a flood of them keeps nothing else waiting.

    Args:
        handle: Takes each message, in the event loop.
        handled: Called in the event loop after some were handled.
    """

    def __init__(self, handle: Callable[[Incoming], None], handled: Callable[[], None]) -> None:
        self._handle = handle
        self._on_handled = handled
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Incoming, Receipt]] = deque()
        self._receipts: deque[Receipt] = deque()
        self._at_work = False

    @property
    def full(self) -> bool:
        """True while no more should be read."""
        return len(self._waiting) >= MAX_INBOX

    def put(self, loop: asyncio.AbstractEventLoop, message: Incoming, receipt: Receipt) -> None:
        """Hand a message over.

        Raises:
            RuntimeError: If the event loop is closed.
        """
        with self._lock:
            self._waiting.append((message, receipt))
            if self._at_work:
                return
            self._at_work = True
        loop.call_soon_threadsafe(self._work, loop)

    def take_receipts(self, attempt: int) -> list[int]:
        """Return the numbers of the messages that were handled, in order, of those that came by this connection."""
        with self._lock:
            receipts, self._receipts = self._receipts, deque()
        return [receipt.number for receipt in receipts if receipt.attempt == attempt]

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(_BATCH):
            with self._lock:
                if not self._waiting:
                    self._at_work = False
                    break
                message, receipt = self._waiting.popleft()
            try:
                self._handle(message)
            except Exception:  # a boundary: one message must not keep all that follow from being handled
                logger.exception("a message on %s could not be handled", message.topic)
            if receipt.number:
                with self._lock:
                    self._receipts.append(receipt)
        else:
            loop.call_soon(self._work, loop)
        self._on_handled()
