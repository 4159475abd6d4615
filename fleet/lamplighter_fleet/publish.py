"""Publishing a package: its files become blobs, its manifest a signed target."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from tuf.api.metadata import TargetFile

from lamplighter_agent.errors import ConfigError, HashMismatchError, MissingFileError, PackageError, UnknownPackageError
from lamplighter_agent.package.durable import make_directory, move, storage_errors, write_file
from lamplighter_agent.package.hashing import digest_file, verify_file
from lamplighter_agent.package.layout import MANIFEST_NAME, check_name
from lamplighter_agent.package.manifest import FileEntry, Manifest, decode_manifest, read_manifest_bytes
from lamplighter_agent.package.onnx_scan import KNOWN_DOMAINS, check_graph
from lamplighter_agent.update.downgrade import DowngradePermission, read_permission, version_key
from lamplighter_agent.update.states import PackageRef
from lamplighter_fleet.repository import PublishedState, Repository, Signed

_BLOCK_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Publication:
    """What `publish_package` did.

    Attributes:
        reference: ``name/version``.
        manifest_sha256: Digest under which the manifest is signed.
        new_bytes: Bytes of blobs that were not in the repository before.
        reused_bytes: Bytes of blobs that were.
        licence: Of the model, as its manifest says.
        signed: The new metadata, or None if exactly this package was published already.
    """

    reference: str
    manifest_sha256: str
    new_bytes: int
    reused_bytes: int
    licence: str
    signed: Signed | None


@dataclass(frozen=True, slots=True)
class PublishedPackage:
    """A package on offer: ``name/version``, and the digest of its manifest."""

    reference: str
    manifest_sha256: str


def list_packages(repository: Repository) -> tuple[PublishedPackage, ...]:
    """Return the packages that a repository offers, sorted by reference.

    Raises:
        SignatureError: If its metadata is not signed by these keys.
        MetadataError: If its metadata is damaged.
        ConfigError: If the key directory has no valid root.
    """
    state = repository.published()
    targets = state.targets.targets if state else {}
    return tuple(
        PublishedPackage(path.removesuffix(f"/{MANIFEST_NAME}"), target.hashes["sha256"])
        for path, target in sorted(targets.items())
        if path.endswith(f"/{MANIFEST_NAME}")
    )


def publish_package(
    package: Path, repository: Repository, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Publication:
    """Put a package into a repository and sign it. Run again after any interruption, it completes what is missing.

    Args:
        package: The package directory.
        repository: Where to, and with which keys.
        progress: Called with the bytes copied or found and the bytes of the package.

    Raises:
        ManifestError: If the manifest is missing or breaks a rule of the format.
        MissingFileError: If a listed file is not in the package.
        HashMismatchError: If a file, or one of its chunks, is not as the manifest says.
        GraphError: If the graph asks for something that no package may ask for.
        PackageError: If other bytes are published under this name and version.
        SignatureError: If the published metadata is not signed by these keys.
        MetadataError: If the published metadata is damaged.
        ConfigError: If a key cannot be used.
        StoreError: If the repository cannot be written; what it showed it shows still.
    """
    manifest_bytes = read_manifest_bytes(package)
    manifest = decode_manifest(manifest_bytes, origin=str(package / MANIFEST_NAME))
    _verify_files(package, manifest)
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    path = f"{manifest.reference}/{MANIFEST_NAME}"
    with repository.lock():
        before = repository.published()
        files = dict(before.targets.targets) if before else {}
        known = files.get(path)
        if known is not None and known.hashes.get("sha256") != digest:
            raise PackageError(
                f"{manifest.reference} is published already, with other content",
                hint="published packages never change: build it with a new version",
            )
        new_bytes = _copy_blobs(package, manifest, repository.directory, progress)
        with storage_errors(f"writing the manifest of {manifest.reference}"):
            directory = repository.directory / "targets" / manifest.name / manifest.version
            make_directory(directory)
            write_file(directory / f"{digest}.{MANIFEST_NAME}", manifest_bytes)
        signed = None
        if known is None:
            files[path] = TargetFile.from_data(path, manifest_bytes, ["sha256"])
            signed = repository.sign_targets(files, before)
    reused_bytes = manifest.total_bytes - new_bytes
    return Publication(manifest.reference, digest, new_bytes, reused_bytes, manifest.licence, signed)


def withdraw_package(reference: str, repository: Repository) -> Signed:
    """Take a package off the list: no device takes it up any more. Its files stay, and so does what runs already.

    Raises:
        UnknownPackageError: If it is not published.
        SignatureError: If the published metadata is not signed by these keys.
        MetadataError: If the published metadata is damaged.
        ConfigError: If a key cannot be used.
        StoreError: If the repository cannot be written; what it showed it shows still.
    """
    with repository.lock():
        before, files = _published_files(repository, reference)
        del files[f"{reference}/{MANIFEST_NAME}"]
        return repository.sign_targets(files, before)


def allow_downgrade(reference: str, replaces: str, repository: Repository) -> Signed | None:
    """Sign a permission for devices to go from a higher version of a package to this lower one.

    Args:
        reference: ``name/version`` of the lower one.
        replaces: The higher version.
        repository: Where both are published, and with which keys.

    Returns:
        The new metadata, or None if exactly this was permitted already.

    Raises:
        UnknownPackageError: If it is not published.
        ConfigError: If the version is not higher, or a key cannot be used.
        SignatureError: If the published metadata is not signed by these keys.
        MetadataError: If the published metadata is damaged.
        StoreError: If the repository cannot be written; what it showed it shows still.
    """
    package = PackageRef.parse(reference)
    check_name(replaces, "version")
    if version_key(replaces) <= version_key(package.version):
        raise ConfigError(
            f"{package.name}/{replaces} is not higher than {reference}",
            hint="devices go to a higher version without a permission",
        )
    with repository.lock():
        before, files = _published_files(repository, reference)
        path = f"{reference}/{MANIFEST_NAME}"
        known = read_permission(files[path].custom).replaces
        if replaces in known:
            return None
        permission = DowngradePermission(replaces=(*known, replaces))
        files[path].unrecognized_fields["custom"] = {"lamplighter": msgspec.to_builtins(permission)}
        return repository.sign_targets(files, before)


def _published_files(repository: Repository, reference: str) -> tuple[PublishedState, dict[str, TargetFile]]:
    """Return what is published, with a list of targets to change.

    Raises:
        UnknownPackageError: If the package is not among them.
    """
    state = repository.published()
    if state is None or f"{reference}/{MANIFEST_NAME}" not in state.targets.targets:
        raise UnknownPackageError(
            f"{reference} is not published in {repository.directory}",
            hint="list what is: lamplighter-fleet packages",
        )
    return state, dict(state.targets.targets)


def _verify_files(package: Path, manifest: Manifest) -> None:
    model = package / manifest.file("model").name
    if model.is_file():
        with storage_errors(f"reading {model}"):
            check_graph(model, KNOWN_DOMAINS, frozenset(entry.name for entry in manifest.files))
    for entry in manifest.files:
        path = package / entry.name
        if path.is_symlink() or not path.is_file():
            raise MissingFileError(f"{path}: the manifest lists it, but there is no such regular file")
        with storage_errors(f"reading {path}"):
            digest = digest_file(path, entry.chunk_bytes if entry.chunk_sha256 else _BLOCK_BYTES)
        if (digest.length, digest.sha256) != (entry.length, entry.sha256):
            raise HashMismatchError(
                f"{path}: {digest.length} bytes with sha256 {digest.sha256}, but the manifest says {entry.length} "
                f"bytes with {entry.sha256}"
            )
        if entry.chunk_sha256 and digest.chunk_sha256 != entry.chunk_sha256:
            raise HashMismatchError(f"{path}: the chunk hashes in the manifest are not those of the file")


def _copy_blobs(package: Path, manifest: Manifest, repository: Path, progress: Callable[[int, int], None]) -> int:
    """Copy what the repository lacks; return how many bytes that were."""
    blobs = repository / "blobs" / "sha256"
    new_bytes = done = 0
    with storage_errors(f"copying {manifest.reference} to {blobs}"):
        make_directory(blobs)
        for entry in manifest.files:
            blob = blobs / entry.sha256
            if not _is_whole(blob, entry):
                _copy_blob(package / entry.name, blob, entry)
                new_bytes += entry.length
            done += entry.length
            progress(done, manifest.total_bytes)
    return new_bytes


def _is_whole(blob: Path, entry: FileEntry) -> bool:
    try:
        verify_file(blob, entry)
    except (MissingFileError, HashMismatchError):
        return False
    return True


def _copy_blob(source: Path, blob: Path, entry: FileEntry) -> None:
    """Copy and hash in one pass: the file may have been changed since it was verified."""
    temporary = blob.with_name(f".{blob.name}.tmp")
    hasher = hashlib.sha256()
    with source.open("rb", buffering=0) as reader, temporary.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            hasher.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    if hasher.hexdigest() != entry.sha256:
        temporary.unlink()
        raise HashMismatchError(f"{source}: changed while it was being published")
    move(temporary, blob)
