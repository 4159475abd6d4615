"""Writes that survive a power cut: temp file in the same directory, fsync, rename, fsync of the directory.

Every change of what the agent trusts or runs goes through these functions, so that a test can stop the process at
each of them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamplighter_agent.errors import DiskFullError, StoreError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn the operating system's errors inside the block into errors of the store.

    Args:
        action: What is being done to which path, in the present participle: ``"writing /var/x"``.

    Raises:
        DiskFullError: If the device is full or over its quota.
        StoreError: For every other ``OSError``: read-only, no permission, input/output error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"{action}: {error.strerror}", hint="free some space on this file system") from error
        hint = None
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            hint = "the directory must be writable by the user that runs this program"
        raise StoreError(f"{action}: {error.strerror or error}", hint=hint) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each one's entry made durable.

    Raises:
        OSError: If that fails.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable.

    Raises:
        OSError: If that fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` at ``path``: afterwards, and after a crash at any point, the old or the new file is there, whole.

    Args:
        path: The file; its directory exists.
        data: The new content.
        mode: Permissions of a new file, before the umask.

    Raises:
        OSError: If that fails; ``path`` is then as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb", closefd=True) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        move(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def move(source: Path, destination: Path) -> None:
    """Rename atomically and make it durable; a file or link at ``destination`` is replaced.

    Raises:
        OSError: If that fails.
    """
    source.replace(destination)
    sync_directory(destination.parent)
    if source.parent != destination.parent:
        sync_directory(source.parent)


def point_link(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target`` in one atomic step, whatever it was before.

    Raises:
        OSError: If that fails; ``link`` is then as before.
    """
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    move(temporary, link)


def remove_file(path: Path) -> None:
    """Remove a file or link, durably; one that is not there is fine.

    Raises:
        OSError: If that fails.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def remove_directory(path: Path, trash: Path) -> None:
    """Remove a tree: it leaves its place in one step, then its content goes from ``trash`` at leisure.

    Args:
        path: The directory to remove; one that is not there is fine.
        trash: A path on the same file system that holds nothing but rubbish of an earlier call.

    Raises:
        OSError: If that fails.
    """
    if trash.is_dir():
        shutil.rmtree(trash)
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    sync_directory(path.parent)
    shutil.rmtree(trash)
