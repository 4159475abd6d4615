"""Files of packages by content: one blob for each sha256, shared by all packages on this device."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from lamplighter_agent.errors import DiskFullError
from lamplighter_agent.package.durable import remove_file, storage_errors, sync_directory
from lamplighter_agent.package.layout import check_sha256
from lamplighter_agent.package.manifest import FileEntry, Manifest
from lamplighter_agent.update.installed import regular_size

_PART = ".part"


class BlobStore:
    """The directory ``blobs/``: ``SHA256``, and ``SHA256.part`` while it is being fetched.

    Args:
        directory: Where the blobs lie.
        reserve_bytes: Free space that a download must leave to the rest of the device.
    """

    def __init__(self, directory: Path, *, reserve_bytes: int) -> None:
        self.directory = directory
        self._reserve_bytes = reserve_bytes

    def path(self, entry: FileEntry) -> Path:
        """Return where a file's content lies, or will lie.

        Raises:
            ManifestError: If the digest is not one.
        """
        return self.directory / check_sha256(entry.sha256, entry.name)

    def missing(self, manifest: Manifest) -> tuple[FileEntry, ...]:
        """Return one entry for each content of the package that is not here."""
        missing: dict[str, FileEntry] = {}
        for entry in manifest.files:
            if regular_size(self.path(entry)) != entry.length:
                missing.setdefault(entry.sha256, entry)
        return tuple(missing.values())

    def bytes_present(self, manifest: Manifest) -> int:
        """Return how much of a package is here, unfinished files included."""
        missing = {entry.sha256: self._part_bytes(entry) for entry in self.missing(manifest)}
        return sum(missing.get(entry.sha256, entry.length) for entry in manifest.files)

    def preflight(self, manifest: Manifest, *, extra_bytes: int = 0) -> None:
        """Check that what is missing fits onto the disk.

        Args:
            manifest: The wanted package.
            extra_bytes: Space needed after the download, for example for the prepared weights.

        Raises:
            DiskFullError: If it does not fit beside the reserve.
            StoreError: If the file system cannot be asked.
        """
        needed = extra_bytes + sum(entry.length - self._part_bytes(entry) for entry in self.missing(manifest))
        with storage_errors(f"asking for the free space of {self.directory}"):
            status = os.statvfs(self.directory)
        free = status.f_bavail * status.f_frsize
        if needed + self._reserve_bytes > free:
            raise DiskFullError(
                f"{manifest.reference} needs {needed} more bytes beside a reserve of {self._reserve_bytes}, but "
                f"{self.directory} has {free} free",
                hint="free some space, or lower repository.disk_reserve_mb",
            )

    def discard(self, entry: FileEntry) -> None:
        """Remove a blob that is damaged.

        Raises:
            StoreError: If the file system refuses.
        """
        with storage_errors(f"removing the damaged {entry.name}"):
            remove_file(self.path(entry))

    def discard_parts(self, manifest: Manifest) -> None:
        """Remove what an unfinished download of a package left, to give the space back.

        Raises:
            StoreError: If the file system refuses.
        """
        with storage_errors(f"removing unfinished downloads of {manifest.reference}"):
            for entry in manifest.files:
                blob = self.path(entry)
                remove_file(blob.with_name(blob.name + _PART))

    def remove_unused(self, wanted: Collection[str]) -> None:
        """Remove every blob that no package directory links to.

        Args:
            wanted: Digests of blobs that stay all the same, finished or not.

        Raises:
            OSError: If the file system refuses.
        """
        for blob in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            digest = blob.name.removesuffix(_PART)
            # A blob that is linked from a package directory has more than one name.
            if digest not in wanted and blob.stat().st_nlink == 1:
                blob.unlink()
        sync_directory(self.directory)

    def _part_bytes(self, entry: FileEntry) -> int:
        blob = self.path(entry)
        return min(regular_size(blob.with_name(blob.name + _PART)) or 0, entry.length)
