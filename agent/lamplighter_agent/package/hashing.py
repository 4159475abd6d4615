"""Streaming SHA-256 of files, whole and per chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamplighter_agent.errors import HashMismatchError, MissingFileError

if TYPE_CHECKING:
    from lamplighter_agent.package.manifest import FileEntry


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Length in bytes, sha256 of the whole and of each chunk, all hex."""

    length: int
    sha256: str
    chunk_sha256: tuple[str, ...]


def digest_file(path: Path, chunk_bytes: int) -> FileDigest:
    """Hash a file once, giving the digest of the whole and of every ``chunk_bytes`` bytes.

    Raises:
        OSError: If the file cannot be read.
    """
    whole, chunks, length = hashlib.sha256(), [], 0
    for block in _blocks(path, chunk_bytes):
        whole.update(block)
        chunks.append(hashlib.sha256(block).hexdigest())
        length += len(block)
    return FileDigest(length, whole.hexdigest(), tuple(chunks))


def verify_file(path: Path, entry: FileEntry) -> None:
    """Check one file against its manifest entry: length first, then sha256.

    Raises:
        MissingFileError: If there is no regular file at ``path`` (a link counts as missing).
        HashMismatchError: If length or digest differ; the message names the file and both values.
        OSError: If the file cannot be read.
    """
    if path.is_symlink() or not path.is_file():
        raise MissingFileError(f"{path}: the manifest lists {entry.name}, but there is no such regular file")
    size = path.stat().st_size
    if size != entry.length:
        raise HashMismatchError(f"{path}: {size} bytes, but the manifest says {entry.length}")
    with path.open("rb", buffering=0) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.sha256:
        raise HashMismatchError(f"{path}: sha256 is {digest}, but the manifest says {entry.sha256}")


def _blocks(path: Path, block_bytes: int) -> Iterator[memoryview]:
    """Yield views of one reused buffer: each is valid until the next is asked for."""
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(block_bytes)
        view = memoryview(buffer)
        filled = 0
        while count := stream.readinto(view[filled:]):
            filled += count
            if filled == block_bytes:
                yield view
                filled = 0
        if filled:
            yield view[:filled]
