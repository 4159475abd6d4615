"""A bounded queue of messages on disk, for what cannot be sent while the broker is away.

One file holds one message; its name is a rising number, so that order survives a restart. Each file is written under
a temporary name and renamed: a power cut leaves a whole message or none. When the limit is reached the oldest message
is dropped and counted. Files are not synced one by one: losing the last seconds of telemetry in a power cut costs
less than wearing out the flash.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from lamplighter_agent.errors import StoreError

logger = logging.getLogger(__name__)

_SUFFIX = ".json"


class Spool:
    """Messages in order, oldest first.

    Args:
        folder: Where the files lie; created when missing.
        max_bytes: Most bytes of messages kept.

    Raises:
        StoreError: If the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._entries: deque[tuple[int, int]] = deque()
        self.nbytes = 0
        self.dropped = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(folder.iterdir(), key=lambda item: item.name):
                if path.suffix == _SUFFIX and path.stem.isdigit():
                    self._append(int(path.stem), path.stat().st_size)
                else:
                    path.unlink()
        except OSError as error:
            raise StoreError(f"cannot use the telemetry spool {folder}: {error}") from error
        self._next = self._entries[-1][0] + 1 if self._entries else 1

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, message: bytes) -> None:
        """Add a message; the oldest ones make room.

        Raises:
            StoreError: If the message cannot be written; it counts as dropped.
        """
        if len(message) > self._max_bytes:
            self.dropped += 1
            return
        while self._entries and self.nbytes + len(message) > self._max_bytes:
            self.drop_first()
            self.dropped += 1
        path = self._path(self._next)
        temporary = path.with_suffix(".part")
        try:
            temporary.write_bytes(message)
            temporary.rename(path)
        except OSError as error:
            self.dropped += 1
            _remove(temporary)
            raise StoreError(f"cannot write the telemetry spool {path}: {error}") from error
        self._append(self._next, len(message))
        self._next += 1

    def first(self) -> bytes | None:
        """Return the oldest message without removing it, or None when the spool is empty."""
        while self._entries:
            try:
                return self._path(self._entries[0][0]).read_bytes()
            except OSError as error:
                logger.warning("a spooled message is lost: %s", error)
                self.drop_first()
                self.dropped += 1
        return None

    def drop_first(self) -> None:
        """Remove the oldest message, after it was sent; on a disk that takes no changes, until the next start."""
        number, nbytes = self._entries.popleft()
        self.nbytes -= nbytes
        _remove(self._path(number))

    def _append(self, number: int, nbytes: int) -> None:
        self._entries.append((number, nbytes))
        self.nbytes += nbytes

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:016d}{_SUFFIX}"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove from the telemetry spool: %s", error)
