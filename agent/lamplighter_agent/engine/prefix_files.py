"""Prefixes on disk: what the prefix cache held, kept over a restart.

One file a sequence: eight bytes of magic, the header's length, the header (msgpack: key, tokens, digest), then keys and
values token by token as the cache lays them out. The key says which package, runtime, processor and cache layout the
values belong to; a file of another key is left alone until room is needed. Headers are read at the start and values
only when a prompt needs them. A file that cannot be read, or whose digest or values are wrong, is removed and never
used. Files are written beside their name and renamed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import numpy as np

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import CacheArray
from lamplighter_agent.engine.prefix_cache import PrefixCache, TokenArray, common_prefix
from lamplighter_agent.package.durable import make_directory, move

logger = logging.getLogger(__name__)

_MAGIC: Final = b"LAMPKV01"
_LENGTH: Final = struct.Struct(">I")
_MAX_HEADER_BYTES: Final = 8 * 1024 * 1024
_MAX_FILES: Final = 1024
_PIECE_BYTES: Final = 1024 * 1024
_SUFFIX: Final = ".prefix"


class _Header(msgspec.Struct, frozen=True):
    key: str
    tokens: bytes
    sha256: bytes


class _Entry(msgspec.Struct, frozen=True):
    path: Path
    tokens: TokenArray
    sha256: bytes
    begin: int


class PrefixFiles:
    """The prefixes of one package in a directory that other packages share.

    Args:
        directory: Where the files lie; made when the first one is written.
        key: What the values belong to.
        spec: Shape of the cache.
        vocab_size: Tokens that may occur.
        max_bytes: Most bytes of all files together.
    """

    def __init__(self, directory: Path, key: str, spec: CacheSpec, *, vocab_size: int, max_bytes: int) -> None:
        self._directory = directory
        self._key = key
        self._spec = spec
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._entries: dict[Path, _Entry] = {}
        for path in _listed(directory)[:_MAX_FILES]:
            try:
                entry = self._read_header(path)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                self._discard(path, error)
            else:
                if entry is not None:
                    self._entries[path] = entry

    def recall(self, prefixes: PrefixCache, tokens: Sequence[int], beyond: int) -> None:
        """Bring the longest stored beginning of ``tokens`` into the cache if that has a shorter one.

        Nothing is read for up to ``beyond`` tokens.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        while self._entries:
            held = max(prefixes.match(tokens), beyond)
            length, entry = max(
                ((common_prefix(entry.tokens, wanted), entry) for entry in self._entries.values()),
                key=lambda found: found[0],
            )
            if length <= held or length * self._spec.bytes_per_token > prefixes.max_bytes:
                return
            try:
                stored = self._load(prefixes, entry, length)
            except (OSError, ValueError) as error:
                self._discard(entry.path, error)
                continue
            if stored < length:
                # There is no room for it: asking again would read it again.
                del self._entries[entry.path]

    def save(self, prefixes: PrefixCache) -> None:
        """Write what the cache holds, pinned first, then last used first, as far as there is room; old files go.

        Failures are logged: the cache is a help, never a need.
        """
        try:
            self._save(prefixes)
        except OSError as error:
            logger.warning("prefixes cannot be kept in %s: %s", self._directory, error)

    def clear(self) -> None:
        """Remove every file; failures are logged."""
        self._entries.clear()
        try:
            for path in _listed(self._directory):
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("prefix files in %s cannot be removed: %s", self._directory, error)

    def _save(self, prefixes: PrefixCache) -> None:
        make_directory(self._directory)
        free = self._max_bytes
        kept: list[TokenArray] = []
        names: set[str] = set()
        for tokens, parts in prefixes.sequences():
            path = self._directory / self._name(tokens)
            size = len(tokens) * self._spec.bytes_per_token
            if size > free:
                continue
            if path not in self._entries:
                self._entries[path] = self._write(path, tokens, parts)
            os.utime(path)
            free -= size
            kept.append(tokens)
            names.add(path.name)
        for path in _listed(self._directory):
            if path.name in names:
                continue
            entry, size = self._entries.get(path), path.stat().st_size
            if size > free or (entry is not None and _begins_one(entry.tokens, kept)):
                path.unlink(missing_ok=True)
                self._entries.pop(path, None)
            else:
                free -= size

    def _name(self, tokens: TokenArray) -> str:
        return hashlib.sha256(self._key.encode() + b"\0" + _packed(tokens)).hexdigest()[:32] + _SUFFIX

    def _write(self, path: Path, tokens: TokenArray, parts: list[CacheArray]) -> _Entry:
        digest = _digest(self._key, _packed(tokens))
        for part in parts:
            digest.update(part.data.cast("B"))
        header = msgspec.msgpack.encode(_Header(self._key, _packed(tokens), digest.digest()))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(_MAGIC + _LENGTH.pack(len(header)) + header)
                begin = stream.tell()
                for part in parts:
                    stream.write(part.data.cast("B"))
                stream.flush()
                os.fsync(stream.fileno())
            move(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return _Entry(path, tokens, digest.digest(), begin)

    def _read_header(self, path: Path) -> _Entry | None:
        """Return what a file holds; None if it belongs to another key.

        Raises:
            ValueError: If it is not whole and well-formed.
            msgspec.MsgspecError: If the header is no header.
            OSError: If it cannot be read.
        """
        with path.open("rb") as stream:
            start = stream.read(len(_MAGIC) + _LENGTH.size)
            if len(start) != len(_MAGIC) + _LENGTH.size or not start.startswith(_MAGIC):
                raise ValueError("it is no prefix file")
            (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            header = msgspec.msgpack.decode(stream.read(length), type=_Header)
            if header.key != self._key:
                return None
            begin = stream.tell()
        tokens = np.frombuffer(header.tokens, dtype="<i4").astype(np.int64)
        if path.stat().st_size != begin + len(tokens) * self._spec.bytes_per_token or not len(tokens):
            raise ValueError("its length does not fit its tokens")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError("it holds tokens outside the vocabulary")
        return _Entry(path, tokens, header.sha256, begin)

    def _load(self, prefixes: PrefixCache, entry: _Entry, tokens: int) -> int:
        """Verify a file and store its first ``tokens`` tokens; return how many are stored.

        Raises:
            ValueError: If the content is not what was written.
            OSError: If it cannot be read.
        """
        with entry.path.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            digest = _digest(self._key, _packed(entry.tokens))
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
            if digest.digest() != entry.sha256:
                raise ValueError("its digest is wrong")

            def fill(rows: CacheArray, first: int) -> None:
                stream.seek(entry.begin + first * self._spec.bytes_per_token)
                _read_into(stream, rows)
                if not np.isfinite(rows).all():
                    raise ValueError("it holds values that are not finite")

            stored = prefixes.store_filled(entry.tokens[:tokens].tolist(), fill)
        os.utime(entry.path)
        return stored

    def _discard(self, path: Path, error: Exception) -> None:
        logger.warning("the prefix file %s is removed: %s", path, error)
        self._entries.pop(path, None)
        path.unlink(missing_ok=True)


def _listed(directory: Path) -> list[Path]:
    """Return the prefix files of a directory, last used first; remains of interrupted writes go."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)
        elif path.suffix == _SUFFIX and path.is_file() and not path.is_symlink():
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _begins_one(tokens: TokenArray, longer: list[TokenArray]) -> bool:
    return any(common_prefix(tokens, other) == len(tokens) for other in longer)


def _packed(tokens: TokenArray) -> bytes:
    return tokens.astype("<i4").tobytes()


def _digest(key: str, tokens: bytes) -> hashlib._Hash:
    return hashlib.sha256(key.encode() + b"\0" + tokens)


def _read_into(stream: BinaryIO, rows: CacheArray) -> None:
    target = rows.data.cast("B")
    while len(target):
        count = stream.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ends too early")
        target = target[count:]
