"""The signed metadata of a static repository directory.

The chain that is published is the one that ``timestamp.json`` leads to. A change writes every new file beside the old
ones and replaces ``timestamp.json`` last, in one rename: a client sees the state before or the state after.

The directory may lie on a host that is not trusted with keys. So what is read back from it is verified against the
root of the key directory before anything built on it is signed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from lamplighter_agent.errors import ConfigError, MetadataError, SignatureError, StoreError
from lamplighter_agent.package.durable import make_directory, storage_errors, write_file
from lamplighter_fleet.keys import KeyDirectory, in_days

_T = TypeVar("_T", Snapshot, Targets, Timestamp)
_TARGETS_FILE: Final = "targets.json"
_SNAPSHOT_FILE: Final = "snapshot.json"


@dataclass(frozen=True, slots=True)
class Expiry:
    """Days after which metadata counts as withheld; devices refuse it from then on, and go on serving.

    Attributes:
        targets_days: For the list of packages, signed offline.
        snapshot_days: For the state of the repository, renewed by `refresh`.
        timestamp_days: For its freshness, renewed by `refresh`: the longest that an attacker can hide an update.
    """

    targets_days: int = 365
    snapshot_days: int = 30
    timestamp_days: int = 14


@dataclass(frozen=True, slots=True)
class PublishedState:
    """The metadata that the repository shows now."""

    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets


@dataclass(frozen=True, slots=True)
class Signed:
    """Versions and expiry dates of newly signed metadata."""

    targets_version: int
    snapshot_version: int
    timestamp_version: int
    snapshot_expires: datetime
    timestamp_expires: datetime


class Repository:
    """A static repository directory: ``metadata/``, ``targets/`` and ``blobs/sha256/``.

    Args:
        directory: The directory that a web server shows.
        keys: The operator's keys.
        expiry: How long new metadata is valid.
    """

    def __init__(self, directory: Path, keys: KeyDirectory, expiry: Expiry | None = None) -> None:
        self.directory = directory
        self.metadata_dir = directory / "metadata"
        self._keys = keys
        self._expiry = expiry or Expiry()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to publish; ``metadata/`` exists inside.

        Raises:
            StoreError: If another process is publishing here, or the directory is not writable.
        """
        with storage_errors(f"opening the repository {self.directory}"):
            make_directory(self.metadata_dir)
            descriptor = os.open(self.directory / ".publishing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"{self.directory}: another process is publishing here") from error
            yield
        finally:
            os.close(descriptor)

    def published(self, roots: Sequence[Root] | None = None) -> PublishedState | None:
        """Return what the repository shows now, verified; None if nothing was published yet. Expiry does not matter.

        Args:
            roots: One of these must name the keys; None: the newest alone.

        Raises:
            SignatureError: If metadata is not signed by the keys of the key directory.
            MetadataError: If metadata is missing, malformed or not what the metadata above it says.
            ConfigError: If the key directory has no valid root.
        """
        if not (self.metadata_dir / "timestamp.json").exists():
            return None
        roots = roots or [self._keys.roots()[-1].signed]
        timestamp = self._read("timestamp.json", Timestamp, None, roots)
        snapshot_meta = timestamp.snapshot_meta
        snapshot = self._read(f"{snapshot_meta.version}.{_SNAPSHOT_FILE}", Snapshot, snapshot_meta, roots)
        targets_meta = snapshot.meta[_TARGETS_FILE]
        targets = self._read(f"{targets_meta.version}.{_TARGETS_FILE}", Targets, targets_meta, roots)
        return PublishedState(timestamp, snapshot, targets)

    def sign_targets(self, files: dict[str, TargetFile], before: PublishedState | None) -> Signed:
        """Sign a new list of packages and show it.

        Args:
            files: Every target, by path.
            before: The state that it replaces.

        Raises:
            ConfigError: If a key cannot be used.
            StoreError: If the files cannot be written; the repository then shows what it showed.
        """
        version = self._next_version(_TARGETS_FILE, before.targets.version if before else 0)
        targets = Targets(version=version, expires=in_days(self._expiry.targets_days), targets=files)
        # All keys are opened before the first file is written.
        signers = {role: self._keys.signers(role) for role in (Targets.type, Snapshot.type, Timestamp.type)}
        self._check_roots()
        data = _sign(targets, signers[Targets.type])
        with storage_errors(f"writing {version}.{_TARGETS_FILE}"):
            write_file(self.metadata_dir / f"{version}.{_TARGETS_FILE}", data)
        return self._sign_snapshot(MetaFile.from_data(version, data, ["sha256"]), before)

    def refresh(self) -> Signed:
        """Sign snapshot and timestamp anew, so that they do not expire; the list of packages stays.

        Raises:
            ConfigError: If nothing was published yet, or a key cannot be used.
            SignatureError: If the published metadata is not signed by these keys.
            MetadataError: If it is damaged.
            StoreError: If the files cannot be written.
        """
        with self.lock():
            before = self.published()
            if before is None:
                raise ConfigError(f"{self.directory}: nothing is published here yet", hint="publish a package first")
            self._check_roots()
            return self._sign_snapshot(before.snapshot.meta[_TARGETS_FILE], before)

    def take_over(self) -> Signed | None:
        """Sign anew, after a change of keys, what keys that count no more have signed, and show the new root.

        What is published is verified with the root under which it was signed. So look at the list of packages when a
        targets key was stolen: what its thief had published is taken over as well.

        Returns:
            The new metadata, or None if nothing was published yet.

        Raises:
            ConfigError: If a key cannot be used.
            SignatureError: If the published metadata is not signed by keys of this or an earlier root.
            MetadataError: If it is damaged.
            StoreError: If the files cannot be written; the repository then shows what it showed.
        """
        with self.lock():
            roots = [metadata.signed for metadata in reversed(self._keys.roots())]
            before = self.published(roots)
            if before is None:
                return None
            self._check_roots()
            meta = before.snapshot.meta[_TARGETS_FILE]
            try:
                self._read(f"{meta.version}.{_TARGETS_FILE}", Targets, meta, roots[:1])
            except SignatureError:
                return self.sign_targets(dict(before.targets.targets), before)
            return self._sign_snapshot(meta, before)

    def _sign_snapshot(self, targets_meta: MetaFile, before: PublishedState | None) -> Signed:
        version = self._next_version(_SNAPSHOT_FILE, before.snapshot.version if before else 0)
        snapshot = Snapshot(
            version=version, expires=in_days(self._expiry.snapshot_days), meta={_TARGETS_FILE: targets_meta}
        )
        snapshot_data = _sign(snapshot, self._keys.signers(Snapshot.type))
        timestamp = Timestamp(
            version=before.timestamp.version + 1 if before else 1,
            expires=in_days(self._expiry.timestamp_days),
            snapshot_meta=MetaFile.from_data(version, snapshot_data, ["sha256"]),
        )
        timestamp_data = _sign(timestamp, self._keys.signers(Timestamp.type))
        with storage_errors(f"writing metadata to {self.metadata_dir}"):
            write_file(self.metadata_dir / f"{version}.{_SNAPSHOT_FILE}", snapshot_data)
            # A device that has a new root accepts nothing that old keys signed: so the timestamp follows at once.
            self._write_roots()
            write_file(self.metadata_dir / "timestamp.json", timestamp_data)
        return Signed(
            targets_version=targets_meta.version,
            snapshot_version=version,
            timestamp_version=timestamp.version,
            snapshot_expires=snapshot.expires,
            timestamp_expires=timestamp.expires,
        )

    def _check_roots(self) -> None:
        """Compare the roots that the repository shows with those of the key directory.

        Raises:
            ConfigError: If it was made with other keys, or is ahead of the key directory.
        """
        own = {root.signed.version: root.to_bytes() for root in self._keys.roots()}
        for path in self.metadata_dir.glob("[0-9]*.root.json"):
            version = int(path.name.partition(".")[0])
            if own.get(version) != path.read_bytes():
                raise ConfigError(
                    f"{path}: another root than that of the key directory",
                    hint="this repository was made with other keys; name theirs, or an empty repository directory",
                )

    def _write_roots(self) -> None:
        for root in self._keys.roots():
            path = self.metadata_dir / f"{root.signed.version}.root.json"
            if not path.exists():
                write_file(path, root.to_bytes())

    def _read(self, name: str, kind: type[_T], meta: MetaFile | None, roots: Sequence[Root]) -> _T:
        path = self.metadata_dir / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MetadataError(f"{path}: published metadata cannot be read: {error.strerror}") from error
        try:
            if meta is not None:
                meta.verify_length_and_hashes(data)
            metadata = Metadata[_T].from_bytes(data)
        except (LengthOrHashMismatchError, RepositoryError, ValueError) as error:
            raise MetadataError(f"{path}: {error}") from error
        signed = metadata.signed
        if not isinstance(signed, kind):
            raise MetadataError(f"{path}: holds {signed.type}, not {kind.type}")
        refused: list[RepositoryError] = []
        for root in roots:
            try:
                root.verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)
            except RepositoryError as error:
                refused.append(error)
            else:
                return signed
        raise SignatureError(
            f"{path}: not signed by the keys in {self._keys.path}: {refused[0]}",
            hint="after a change of keys: lamplighter-fleet keys apply; else somebody else published here, or this is "
            "the wrong key directory",
        )

    def _next_version(self, name: str, published: int) -> int:
        """Return a version whose file was never written, not even by a publication that was cut off."""
        written = [int(path.name.partition(".")[0]) for path in self.metadata_dir.glob(f"[0-9]*.{name}")]
        return max([published, *written]) + 1


def _sign(signed: _T, signers: Sequence[Signer]) -> bytes:
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()
