"""What a download reads from: the interface that HTTP and a local directory share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lamplighter_agent.errors import DownloadError, MissingFileError

BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class SourceStream:
    """An open file of a source.

    Attributes:
        blocks: Its bytes from ``offset`` on, in blocks of at most ``BLOCK_BYTES``.
        offset: Where the blocks begin: what was asked for, or 0 if the source cannot begin elsewhere.
        total_bytes: Size of the whole file as announced, or None.
        etag: Identity of this state of the file, or None.
    """

    blocks: Iterator[bytes]
    offset: int
    total_bytes: int | None
    etag: str | None


class Source(Protocol):
    """A tree of files: ``metadata/…``, ``targets/…`` and ``blobs/…`` of a repository."""

    def open(self, path: str, *, offset: int = 0, etag: str | None = None) -> AbstractContextManager[SourceStream]:
        """Open a file.

        Args:
            path: Path in the tree, with forward slashes.
            offset: First byte wanted.
            etag: State of the file that ``offset`` belongs to; another state is sent from its beginning.

        Raises:
            MissingFileError: If there is no such file.
            HttpError: If a server answers with any other status that is not success.
            SlowDownloadError: If the source falls silent.
            TruncatedDownloadError: If the transfer breaks off.
            DownloadError: For every other failure of transport.
        """
        ...

    def describe(self, path: str) -> str:
        """Return the file's address as a person knows it."""
        ...


class DirectorySource:
    """A repository in a local directory, for example on a USB stick."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str | None = None) -> Iterator[SourceStream]:
        """Open a file of the directory; see `Source.open`."""
        place = self._place(path)
        try:
            # O_NONBLOCK: a pipe on the stick must not stop the agent.
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError(f"{place}: no such file", hint="is the right directory mounted?") from error
        except OSError as error:
            raise DownloadError(f"{place}: {error.strerror}") from error
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MissingFileError(f"{place}: not a regular file")
            state = f'"{status.st_size:x}-{status.st_mtime_ns:x}"'
            begin = offset if etag in {None, state} and offset <= status.st_size else 0
            stream.seek(begin)
            yield SourceStream(_read_blocks(stream.fileno(), place), begin, status.st_size, state)

    def describe(self, path: str) -> str:
        """Return the file's path."""
        return str(self._root / path)

    def _place(self, path: str) -> Path:
        parts = path.split("/")
        if any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise MissingFileError(f"{path!r} is not a path inside the repository")
        return self._root.joinpath(*parts)


def _read_blocks(descriptor: int, place: Path) -> Iterator[bytes]:
    while True:
        try:
            block = os.read(descriptor, BLOCK_BYTES)
        except OSError as error:
            raise DownloadError(f"{place}: {error.strerror}") from error
        if not block:
            return
        yield block
