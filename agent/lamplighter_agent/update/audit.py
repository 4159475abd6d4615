"""The audit log of this device: who asked for what, and what happened. Append-only and bounded in size."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.errors import StoreError
from lamplighter_agent.package.durable import move, storage_errors
from lamplighter_agent.update import clock

logger = logging.getLogger(__name__)

AUDIT_NAME: Final = "audit.jsonl"
_MAX_BYTES: Final = 512 * 1024
_MAX_TEXT: Final = 500


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line.

    Attributes:
        time: When, by this device's clock.
        event: What: ``requested``, ``replayed``, ``cancelled``, a state of an update, ``rollback_requested``,
            ``engine_failed``, ``probation_passed``, ``damaged``, ``clock_behind``, ``clock_ahead``,
            ``downgrade_permitted``.
        package: ``name/version`` that it is about, or empty.
        requested_by: Who asked, or empty.
        request: ``Desired.id``, or empty.
        active: ``name/version`` in use, or None.
        reason: Stable code of a failure, or None.
        message: One sentence, or None.
    """

    event: str
    time: datetime = msgspec.field(default_factory=clock.now)
    package: str = ""
    requested_by: str = ""
    request: str = ""
    active: str | None = None
    reason: str | None = None
    message: str | None = None


class AuditLog:
    """The file, and one older file beside it once the first is full.

    Args:
        path: The file; its directory exists when something is written.
        max_bytes: Size at which a new file is begun; both together stay below twice that.
        clock: Tells the time.
    """

    def __init__(self, path: Path, *, max_bytes: int = _MAX_BYTES, clock: Callable[[], datetime] = clock.now) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()

    def write(self, entry: AuditEntry) -> None:
        """Append an entry, durably. What cannot be written is logged: it stops nothing."""
        message = entry.message[:_MAX_TEXT] if entry.message else None
        line = msgspec.json.encode(msgspec.structs.replace(entry, time=self._clock(), message=message)) + b"\n"
        try:
            with self._lock, storage_errors(f"writing {self._path}"):
                self._append(line)
        except StoreError as error:
            logger.warning("an entry of the audit log is lost: %s", error)

    def read(self) -> tuple[AuditEntry, ...]:
        """Return the entries, oldest first; a line that a power cut damaged is left out.

        Raises:
            StoreError: If the files cannot be read.
        """
        entries = []
        with storage_errors(f"reading {self._path}"):
            for path in (self._older, self._path):
                for line in path.read_bytes().splitlines() if path.is_file() else ():
                    try:
                        entries.append(msgspec.json.decode(line, type=AuditEntry))
                    except (msgspec.DecodeError, UnicodeDecodeError):
                        continue
        return tuple(entries)

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            size = os.fstat(descriptor).st_size
            if size + len(line) > self._max_bytes and size:
                os.close(descriptor)
                descriptor = -1
                move(self._path, self._older)
                self._append(line)
                return
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" + line if torn else line)
            os.fsync(descriptor)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
