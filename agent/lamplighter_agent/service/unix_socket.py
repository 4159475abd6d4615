"""The listening Unix socket of the local API: permissions from the first moment, stale files replaced."""

from __future__ import annotations

import grp
import logging
import os
import socket
import stat
from pathlib import Path

from lamplighter_agent.errors import ConfigError, ServiceError

logger = logging.getLogger(__name__)

MAX_PATH_BYTES = 107
BACKLOG = 512
"""Clients that may wait to be accepted; one more is refused by the kernel, or waits, as its system call is."""


def listen(path: Path, *, mode: int, group: str | None) -> socket.socket:
    """Bind a socket; a file that a dead process left is replaced.

    Args:
        path: Where; missing parent directories are made.
        mode: Permissions.
        group: Group that owns it, or None to keep the process's.

    Raises:
        ConfigError: If the group is unknown or the path longer than the kernel takes.
        ServiceError: If a living process listens there, something else is there, or the system refuses.
    """
    group_id = check(path, group)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise ServiceError(f"cannot use the socket {path}: {error.strerror}") from error
    try:
        before = os.umask(0o777)  # nobody can connect before owner and mode are right
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group_id is not None:
            os.chown(path, -1, group_id)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"cannot listen on {path}: {error.strerror}",
            hint="check the directory's permissions and local_api.socket, mode and group",
        ) from error
    return listener


def check(path: Path, group: str | None) -> int | None:
    """Return the id of the group, or None for none, if a socket can have this path and group.

    Raises:
        ConfigError: If the group is unknown or the path longer than the kernel takes.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"local_api.socket {path} has {len(os.fsencode(path))} bytes; the kernel takes {MAX_PATH_BYTES}",
            hint="choose a shorter path",
        )
    return _group_id(group)


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ServiceError(f"{path} exists and is not a socket", hint="remove it, or set local_api.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            logger.info("replacing the socket %s, which a dead process left", path)
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ServiceError(f"cannot tell whether {path} is in use: {error.strerror or error}") from error
    raise ServiceError(
        f"another process listens on {path}", hint="stop the other agent, or choose another local_api.socket"
    )


def _group_id(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(f"local_api.group: there is no group {group!r}", hint="create it, or leave it out") from error
