"""Answers that were given lately, for askers who did not get them: the broker or the link was lost meanwhile."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import Final, NamedTuple

MAX_ANSWERS: Final = 256
MAX_BYTES: Final = 4 * 1024 * 1024
MAX_SEEN: Final = 256


class _Given(NamedTuple):
    payload: bytes
    connection: int
    until_s: float


class AnswerMemory:
    """Keeps final answers of requests with an id, and marks of prompts without one; both bounded."""

    def __init__(self) -> None:
        self._given: OrderedDict[tuple[str, str], _Given] = OrderedDict()
        self._nbytes = 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def keep(self, sender: str, request_id: str, payload: bytes, connection: int, until_s: float) -> None:
        """Keep an answer that is being published.

        Args:
            sender: Reply topic of the request.
            request_id: Its id.
            payload: The final message.
            connection: Number of the broker connection that it leaves by.
            until_s: Monotonic time until which it is worth anything.
        """
        self._drop((sender, request_id))
        self._given[sender, request_id] = _Given(payload, connection, until_s)
        self._nbytes += len(payload)
        while len(self._given) > MAX_ANSWERS or self._nbytes > MAX_BYTES:
            self._drop(next(iter(self._given)))

    def lost(self, sender: str, request_id: str, connection: int) -> bytes | None:
        """Return an answer that is asked for again and may not have arrived, or None.

        An answer that left by the present connection has arrived, or will: who asks again is told nothing twice.
        """
        given = self._given.get((sender, request_id))
        if given is None or given.connection == connection or given.until_s < time.monotonic():
            return None
        self._given[sender, request_id] = given._replace(connection=connection)
        return given.payload

    def is_repeated(self, parts: tuple[bytes, ...], *, duplicate: bool) -> bool:
        """Note a prompt without an id; True if the broker delivers it for the second time.

        Args:
            parts: All that makes the prompt what it is.
            duplicate: The broker says that it may have delivered this message before. Without that mark the same words
                are another question.
        """
        digest = hashlib.sha256(b"\0".join(parts)).digest()
        known = digest in self._seen
        self._seen[digest] = None
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return known and duplicate

    def _drop(self, key: tuple[str, str]) -> None:
        given = self._given.pop(key, None)
        if given is not None:
            self._nbytes -= len(given.payload)
