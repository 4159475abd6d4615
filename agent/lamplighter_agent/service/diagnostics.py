"""What a support person asks for first: who this box is, how it is, and the last lines of its log."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.config import AgentConfig

MAX_LINES: Final = 200
MAX_LOG_BYTES: Final = 32 * 1024
_MODEL_PLACES: Final = (
    Path("/sys/firmware/devicetree/base/model"),
    Path("/sys/class/dmi/id/product_name"),
)


class LogMemory(logging.Handler):
    """Keeps the last lines of the log in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append(self.format(record)[:1000])

    def tail(self, max_bytes: int = MAX_LOG_BYTES) -> list[str]:
        """Return the last lines, oldest first, that fit together into ``max_bytes``."""
        kept: list[str] = []
        for line in reversed(self._lines):
            max_bytes -= len(line.encode())
            if max_bytes < 0:
                break
            kept.append(line)
        return kept[::-1]


def identity() -> dict[str, object]:
    """Return which machine this is, as far as a sandbox lets one see."""
    return {
        "host_name": socket.gethostname(),
        "model": _first_line(_MODEL_PLACES),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()) if _has_os_release() else "",
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "addresses": _addresses(),
    }


def settings(config: AgentConfig) -> dict[str, object]:
    """Return the configuration; it names files of secrets and holds none, except that a proxy may have a password."""
    values: dict[str, object] = msgspec.to_builtins(config, enc_hook=str)
    repository = values["repository"]
    assert isinstance(repository, dict)
    for name in ("url", "proxy"):
        repository[name] = _without_password(repository[name])
    return values


def _without_password(url: object) -> object:
    if not isinstance(url, str) or "@" not in url:
        return url
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if separator else f"***@{url.rpartition('@')[2]}"


def _has_os_release() -> bool:
    return any(Path(place).exists() for place in ("/etc/os-release", "/usr/lib/os-release"))


def _first_line(places: tuple[Path, ...]) -> str | None:
    for place in places:
        try:
            return place.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            continue
    return None


def _addresses() -> list[str]:
    """Return the addresses by which this machine reaches others; nothing is sent to find out."""
    found = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            found.append(str(probe.getsockname()[0]))
    return found
