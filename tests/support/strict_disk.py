"""A disk that keeps only what was made durable, for the process that uses it.

POSIX promises nothing about a write that was not followed by an fsync of the file, nor about a new, renamed or removed
name that was not followed by an fsync of its directory. `StrictDisk` remembers what a process has made durable and can
build the tree that a power cut may leave: with everything else lost, or with the names kept and the data lost, which
is what a journal of metadata alone leaves.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal, NamedTuple

Loss = Literal["nothing", "data", "everything"]


class _Entry(NamedTuple):
    inode: int
    kind: Literal["file", "directory", "link"]
    target: str = ""


class StrictDisk:
    """Watches one directory tree.

    Args:
        root: The tree; all of it counts as durable now.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[int, bytes] = {}
        self._directories: dict[int, dict[str, _Entry]] = {}
        self._held: dict[int, int] = {}
        for directory, _, files in os.walk(root):
            self._keep_directory(Path(directory))
            for name in files:
                path = Path(directory, name)
                if not path.is_symlink():
                    self._files[path.stat().st_ino] = path.read_bytes()

    def sync(self, descriptor: int) -> None:
        """Note an fsync that has succeeded."""
        path = Path(f"/proc/self/fd/{descriptor}")
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._keep_directory(path)
        else:
            self._hold(path, status.st_ino)
            self._files[status.st_ino] = path.read_bytes()

    def close(self) -> None:
        """Let the inodes go."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def rebuild(self, destination: Path, loss: Loss) -> None:
        """Build what a power cut leaves now."""
        placed: dict[int, Path] = {}
        self._rebuild(self._root, self._root.stat().st_ino, destination, loss, placed)

    def _rebuild(self, live: Path, inode: int, to: Path, loss: Loss, placed: dict[int, Path]) -> None:
        to.mkdir()
        entries = self._directories.get(inode, {}) if loss == "everything" else _read_entries(live)
        for name, entry in entries.items():
            place = to / name
            if entry.kind == "directory":
                self._rebuild(live / name, entry.inode, place, loss, placed)
            elif entry.kind == "link":
                place.symlink_to(entry.target)
            elif entry.inode in placed:
                place.hardlink_to(placed[entry.inode])
            else:
                kept = (live / name).read_bytes() if loss == "nothing" else self._files.get(entry.inode, b"")
                place.write_bytes(kept)
                placed[entry.inode] = place

    def _keep_directory(self, path: Path) -> None:
        status = path.stat()
        self._hold(path, status.st_ino)
        entries = _read_entries(path)
        for name, entry in entries.items():
            self._hold(path / name, entry.inode)
        self._directories[status.st_ino] = entries

    def _hold(self, path: Path, inode: int) -> None:
        """Keep an inode from being given to another file, so that its number means one file."""
        if inode not in self._held:
            follow = 0 if str(path).startswith("/proc/self/fd/") and path.parent.name == "fd" else os.O_NOFOLLOW
            self._held[inode] = os.open(path, os.O_PATH | follow | os.O_CLOEXEC)


def _read_entries(directory: Path) -> dict[str, _Entry]:
    entries = {}
    for name in sorted(os.listdir(directory)):  # noqa: PTH208 (a descriptor's path in /proc is not normalised)
        path = directory / name
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            entries[name] = _Entry(status.st_ino, "directory")
        elif stat.S_ISLNK(status.st_mode):
            entries[name] = _Entry(status.st_ino, "link", str(path.readlink()))
        else:
            entries[name] = _Entry(status.st_ino, "file")
    return entries
