"""What the updater remembers across restarts and power cuts: the update at work and the versions that failed here."""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.package.durable import storage_errors, write_file
from lamplighter_agent.update.states import Desired, PackageRef, UpdateReport

logger = logging.getLogger(__name__)

JOURNAL_NAME: Final = "update.json"
_MAX_BYTES = 1024 * 1024
_MAX_FAILED = 32
_MAX_EARLIER = 64


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An update, at work or ended.

    Attributes:
        desired: What was asked for.
        report: The last report.
        interruptions: How often it was cut off while the new package was being prepared, tried or activated.
        cut_offs: How often it was cut off at all.
        running: True while it is at work; found after a restart, it was cut off.
        again: True if it ended for a passing reason, so that the same request may be tried again.
        staged_sha256: Digest of the manifest whose package is in the store, whole, or empty.
        waiting_since: When it began to wait for its window, or None.
    """

    desired: Desired
    report: UpdateReport
    interruptions: int = 0
    cut_offs: int = 0
    running: bool = False
    again: bool = False
    staged_sha256: str = ""
    waiting_since: datetime | None = None


class FailedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A package that failed on this device.

    Attributes:
        reference: Which one.
        manifest_sha256: Digest of the manifest that failed; another manifest is another chance.
        message: Why.
    """

    reference: PackageRef
    manifest_sha256: str
    message: str


class JournalState(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the journal.

    Attributes:
        record: The latest update, or None.
        failed: Versions that failed here, oldest first.
        earlier: Digests of earlier requests, oldest first: told again, they are old news.
        highest: Highest version that has served well here, by package name.
        clock_confirmed: The latest time at which this device's clock agreed with freshly signed metadata, or None.
    """

    record: UpdateRecord | None = None
    failed: tuple[FailedVersion, ...] = ()
    earlier: tuple[str, ...] = ()
    highest: dict[str, str] = {}
    clock_confirmed: datetime | None = None

    def is_earlier(self, desired: Desired) -> bool:
        """Return whether a request has been followed by another one."""
        return digest_of(desired) in self.earlier

    def with_highest(self, reference: PackageRef) -> JournalState:
        """Return the state in which a version counts as the highest of its name."""
        return msgspec.structs.replace(self, highest={**self.highest, reference.name: reference.version})

    def without_record(self) -> JournalState:
        """Return the state before a new request: the present one becomes an earlier one."""
        if self.record is None:
            return self
        earlier = (*self.earlier, digest_of(self.record.desired))[-_MAX_EARLIER:]
        return msgspec.structs.replace(self, record=None, earlier=earlier)

    def failure_of(self, reference: PackageRef, manifest_sha256: str) -> FailedVersion | None:
        """Return why exactly this package failed here, or None."""
        for failed in self.failed:
            if failed.reference == reference and failed.manifest_sha256 == manifest_sha256:
                return failed
        return None

    def with_failure(self, failed: FailedVersion) -> JournalState:
        """Return the state with one failed version more; beyond 32 the oldest is forgotten."""
        others = tuple(other for other in self.failed if other.reference != failed.reference)
        return msgspec.structs.replace(self, failed=(*others, failed)[-_MAX_FAILED:])

    def without_failure(self, reference: PackageRef) -> JournalState:
        """Return the state with a version forgiven."""
        others = tuple(other for other in self.failed if other.reference != reference)
        return msgspec.structs.replace(self, failed=others)


def digest_of(desired: Desired) -> str:
    """Return a short digest of everything that a request says."""
    return hashlib.sha256(msgspec.json.encode(desired, order="deterministic")).hexdigest()[:16]


class Journal:
    """The file that holds a `JournalState`, written durably as a whole.

    Args:
        path: The file; its directory exists when it is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> JournalState:
        """Return what was written last; nothing if there is no journal, or it is damaged: it is never a reason to stop.

        Raises:
            StoreError: If the disk fails.
        """
        with storage_errors(f"reading {self._path}"):
            if not self._path.is_file() or self._path.stat().st_size > _MAX_BYTES:
                return JournalState()
            data = self._path.read_bytes()
        try:
            return msgspec.json.decode(data, type=JournalState)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("%s is damaged and begins anew: %s", self._path, error)
            return JournalState()

    def write(self, state: JournalState) -> None:
        """Replace the content.

        Raises:
            StoreError: If the file system refuses; the old content stays.
        """
        with storage_errors(f"writing {self._path}"):
            write_file(self._path, msgspec.json.encode(state))
