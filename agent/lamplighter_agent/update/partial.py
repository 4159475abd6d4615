"""A file on its way: it grows block by block and keeps only chunks whose hash is right."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lamplighter_agent.errors import HashMismatchError, StoreError, TooLongError, TruncatedDownloadError
from lamplighter_agent.package.durable import move, remove_file, storage_errors
from lamplighter_agent.package.manifest import FileEntry

_READ_BYTES = 1024 * 1024


@dataclass(slots=True)
class Transfer:
    """What one file's download remembers between its connections.

    Attributes:
        etag: State of the file on the server, or None.
        use_range: False once the server's answer to a range made no sense.
        failures: Failures since the last progress.
        bad_chunks: Times in a row that the same chunk was wrong.
        bad_chunk_at: Where that chunk begins.
        writing: Held while the file is being changed.
    """

    etag: str | None = None
    use_range: bool = True
    failures: int = 0
    bad_chunks: int = 0
    bad_chunk_at: int = -1
    writing: threading.Lock = field(default_factory=threading.Lock)

    def count_bad_chunk(self, at: int) -> None:
        """Note that the chunk that begins ``at`` a byte was wrong."""
        self.bad_chunks = self.bad_chunks + 1 if at == self.bad_chunk_at else 1
        self.bad_chunk_at = at


class PartialFile:
    """A download in progress, kept on disk so that a later process goes on from the last whole chunk.

    Nothing about the transfer is stored beside it: on opening, the chunks that are there are hashed again and
    everything from the first wrong one on is cut off. A file without chunk hashes counts as one chunk.

    Args:
        path: Where the incomplete file lies, on the file system of its destination.
        entry: What the signed manifest says about the file.

    Raises:
        StoreError: If the file cannot be opened, read or cut; DiskFullError if there is no space.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self._path = path
        self._entry = entry
        self._chunk_sha256 = entry.chunk_sha256 or (entry.sha256,)
        self._chunk_bytes = entry.chunk_bytes if entry.chunk_sha256 else max(entry.length, 1)
        self._whole = hashlib.sha256()
        self._whole_before_chunk = self._whole.copy()
        self._chunk = hashlib.sha256()
        self._offset = 0
        self._verified = 0
        with storage_errors(f"opening {path}"):
            if path.is_file() and path.stat(follow_symlinks=False).st_nlink > 1:
                path.unlink()  # a second name of some other file, which must not be written to
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._stream = os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0)
        try:
            with storage_errors(f"reading {path}"):
                self._recover()
        except StoreError:
            self._stream.close()
            raise

    @property
    def offset(self) -> int:
        """Bytes written so far; the next block belongs here."""
        return self._offset

    @property
    def verified_bytes(self) -> int:
        """Bytes in chunks whose hash was right."""
        return self._verified

    @property
    def complete(self) -> bool:
        """True once every byte is there and every chunk is right."""
        return self._verified == self._entry.length

    def write(self, block: bytes) -> None:
        """Append a block, checking each chunk that it completes.

        Raises:
            HashMismatchError: If a chunk is wrong; the file is cut back to the beginning of that chunk.
            TooLongError: If the block reaches beyond the signed length; nothing of it is written.
            StoreError: If writing fails; DiskFullError if there is no space.
        """
        if self._offset + len(block) > self._entry.length:
            raise TooLongError(f"{self._entry.name}: the server sends more than the {self._entry.length} bytes signed")
        view = memoryview(block)
        while view:
            part = view[: self._chunk_end() - self._offset]
            with storage_errors(f"writing {self._path}"):
                self._write_all(part)
            self._take(part)
            view = view[len(part) :]

    def finish(self, destination: Path) -> None:
        """Check the hash of the whole and move the file to its destination, durably.

        Raises:
            TruncatedDownloadError: If bytes are missing.
            HashMismatchError: If the chunks are right but the whole is not: the manifest contradicts itself; the
                file is removed.
            StoreError: If the file system refuses.
        """
        if not self.complete:
            raise TruncatedDownloadError(f"{self._entry.name}: {self._verified} of {self._entry.length} bytes are here")
        if (digest := self._whole.hexdigest()) != self._entry.sha256:
            self._stream.close()
            with storage_errors(f"removing {self._path}"):
                remove_file(self._path)
            raise HashMismatchError(
                f"{self._entry.name}: its chunks are right, but it has sha256 {digest}, not {self._entry.sha256}",
                hint="the manifest contradicts itself: publish the package again",
            )
        with storage_errors(f"moving {self._path} to {destination}"):
            os.fsync(self._stream.fileno())
            self._stream.close()
            move(self._path, destination)

    def close(self) -> None:
        """Close the file; what is there stays for the next attempt."""
        self._stream.close()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self) -> None:
        """Hash what an earlier attempt left and cut off everything behind its last right chunk."""
        size = min(os.fstat(self._stream.fileno()).st_size, self._entry.length)
        while self._offset < size:
            # A cut chunk at the end is not worth hashing: where it was cut, the disk may hold anything.
            if self._chunk_end() > size:
                break
            block = self._stream.read(min(_READ_BYTES, self._chunk_end() - self._offset))
            if not block:
                break
            try:
                self._take(block)
            except HashMismatchError:
                break
        self._cut()

    def _take(self, block: bytes | memoryview) -> None:
        """Hash a block that lies within one chunk; at the chunk's end, compare."""
        self._whole.update(block)
        self._chunk.update(block)
        self._offset += len(block)
        if self._offset < self._chunk_end_from(self._verified):
            return
        index = self._verified // self._chunk_bytes
        if self._chunk.hexdigest() != self._chunk_sha256[index]:
            with storage_errors(f"cutting {self._path}"):
                self._cut()
            raise HashMismatchError(
                f"{self._entry.name}: chunk {index + 1} of {len(self._chunk_sha256)} (from byte {self._verified}) "
                f"does not have the signed sha256"
            )
        self._verified = self._offset
        self._whole_before_chunk = self._whole.copy()
        self._chunk = hashlib.sha256()

    def _cut(self) -> None:
        self._stream.truncate(self._verified)
        self._stream.seek(self._verified)
        self._offset = self._verified
        self._whole = self._whole_before_chunk.copy()
        self._chunk = hashlib.sha256()

    def _chunk_end(self) -> int:
        return self._chunk_end_from(self._verified)

    def _chunk_end_from(self, start: int) -> int:
        return min(start + self._chunk_bytes, self._entry.length)

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._stream.write(view) :]
