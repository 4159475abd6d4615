"""Packages on disk: made in a hidden directory beside the target and renamed when they are whole.

A build that fails or is interrupted leaves nothing behind.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lamplighter_agent.errors import BuildError, ConfigError, DiskFullError, StoreError
from lamplighter_agent.package.hashing import digest_file
from lamplighter_agent.package.layout import (
    CHUNK_BYTES,
    GENAI_CONFIG_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    check_name,
)
from lamplighter_agent.package.manifest import FileEntry, FileRole, Manifest, decode_manifest, encode_manifest
from lamplighter_builder.progress import Progress

_ROLES: Final[dict[str, FileRole]] = {
    MODEL_NAME: "model",
    WEIGHTS_NAME: "weights",
    TOKENIZER_NAME: "tokenizer",
    GENAI_CONFIG_NAME: "genai_config",
}
_NOTICE_PREFIXES: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_MAX_NAME: Final = 128


class PackageWriter:
    """A package being written. Use it as a context manager around the whole build.

    Leaving it with an ``OSError`` raises what that means: ``DiskFullError`` or ``StoreError``.

    Args:
        target: Directory of the finished package; it must be missing or empty.

    Raises:
        ConfigError: If ``target`` is not empty, is no directory, or its parent cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        _check_target(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
        except OSError as error:
            raise ConfigError(f"{target.parent}: cannot write there: {error.strerror}") from error
        self._finished = False

    def write(self, name: str, data: bytes) -> None:
        """Write one file durably.

        Raises:
            OSError: If the disk is full or fails.
        """
        with (self.directory / check_name(name, "file name")).open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def copy_notices(self, notices: Iterable[Path]) -> None:
        """Copy licence texts and notices; characters that the format does not allow in names become ``_``.

        Names that become the same are numbered.

        Raises:
            OSError: If one cannot be read, or the disk is full or fails.
        """
        for path in notices:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:_MAX_NAME]
            numbered = (f"{name[: _MAX_NAME - 7]}.{number}" for number in itertools.count(2))
            free = next(text for text in itertools.chain([name], numbered) if not (self.directory / text).exists())
            self.write(free, path.read_bytes())

    def entries(self, progress: Progress) -> tuple[FileEntry, ...]:
        """Hash every file written so far, in the order of their names."""
        paths = sorted(self.directory.iterdir())
        progress.stage("hashing", sum(path.stat().st_size for path in paths))
        found = []
        for path in paths:
            found.append(_entry(path))
            progress.advance(found[-1].length)
        return tuple(found)

    def model_bytes(self) -> int:
        """Return the bytes of model and weights, written before."""
        return sum((self.directory / name).stat().st_size for name in (MODEL_NAME, WEIGHTS_NAME))

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and put the package in its place.

        Raises:
            BuildError: If the target was filled meanwhile.
            ManifestError: If the manifest breaks a rule of the format.
            OSError: If the disk is full or fails.
        """
        data = encode_manifest(manifest)
        decode_manifest(data)  # as every agent does; types are checked there alone
        self.write(MANIFEST_NAME, data)
        self.directory.chmod(0o755)
        _sync_directory(self.directory)
        try:
            self.directory.replace(self._target)
        except OSError as error:
            raise BuildError(f"{self._target}: cannot put the package there: {error.strerror}") from error
        self._finished = True
        _sync_directory(self._target.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._finished:
            shutil.rmtree(self.directory, ignore_errors=True)
        if isinstance(error, OSError):
            raise _storage_error(error, self._target.parent) from error


def _storage_error(error: OSError, parent: Path) -> StoreError:
    """Return what the operating system's error means to who builds a package in ``parent``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{parent}: the disk is full", hint="free space there, or choose another -o")
    if error.errno == errno.EFBIG:
        return DiskFullError(
            f"{parent}: a file may not become as large there as the model's weights",
            hint="raise the limit of file sizes (ulimit -f), or choose another -o",
        )
    return StoreError(f"{error.filename or parent}: {error.strerror or error}")


def is_notice(name: str) -> bool:
    """Tell whether a file's name says that it is a licence text or a notice."""
    return name.upper().startswith(_NOTICE_PREFIXES)


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"{target}: is no directory", hint="choose another -o")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target}: the directory is not empty", hint="choose another -o, or remove it first")


def _entry(path: Path) -> FileEntry:
    digest = digest_file(path, CHUNK_BYTES)
    notice: FileRole = "notice" if is_notice(path.name) else "other"
    return FileEntry(
        name=path.name,
        role=_ROLES.get(path.name, notice),
        length=digest.length,
        sha256=digest.sha256,
        chunk_bytes=CHUNK_BYTES,
        chunk_sha256=digest.chunk_sha256,
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
