"""A disk that from some moment on takes no more writes, as the updater's own process sees it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

DiskFault = Literal["full", "read-only"]
_MAKES_ROOM = ("replace", "rename", "unlink", "rmdir")
_TAKES_ROOM = ("mkdir", "symlink", "link")
_WRITES = os.O_WRONLY | os.O_RDWR


class BrokenDisk:
    """Stands in front of the operating system's calls; whole until `fault` is set.

    On a full disk names can still be moved and removed, but nothing new becomes durable; on a read-only one nothing
    changes at all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: DiskFault | None = None
        for name in (*_MAKES_ROOM, *_TAKES_ROOM, "open"):
            monkeypatch.setattr(os, name, self._guard(name, getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._guard("fsync", os.fstat))  # durability is not what is tested with it
        monkeypatch.setattr(Path, "write_bytes", self._guard("write_bytes", Path.write_bytes))

    def _guard(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 (any call of the operating system)
            if self.fault is not None and self._refuses(name, arguments):
                code = errno.ENOSPC if self.fault == "full" else errno.EROFS
                raise OSError(code, os.strerror(code), str(arguments[0]))
            return call(*arguments, **options)

        return guarded

    def _refuses(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "open":
            makes = arguments[1] & os.O_CREAT and not os.path.lexists(arguments[0])
            return self.fault == "read-only" and bool(arguments[1] & _WRITES or makes)
        return self.fault == "read-only" or name not in _MAKES_ROOM
