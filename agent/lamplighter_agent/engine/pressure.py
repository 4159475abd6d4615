"""Memory pressure: what the kernel says while the engine runs, and what the engine gives up then.

Three steps: nothing; *short*, where the prefix cache goes and stays away for a while; *critical*, where new requests
are refused as well, with a hint when to try again. Requests under way go on: they hold what the plan gave them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from lamplighter_agent.engine.cgroup import memory_levels, pressure_files, read_text
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.errors import RequestError

logger = logging.getLogger(__name__)

PressureLevel = Literal["none", "short", "critical"]

MIB: Final = 1024 * 1024
RETRY_AFTER_S: Final = 5.0
_INTERVAL_S: Final = 1.0
_RECOVERY_S: Final = 30.0

_SOME_PERCENT: Final = 10.0
"""Share of the last ten seconds in which some process waited for memory that counts as short …"""
_FULL_PERCENT: Final = 10.0
"""… and in which all of them waited that counts as critical."""

_SHORT_SHARE: Final = 1 / 24
_CRITICAL_SHARE: Final = 1 / 64
"""Shares of a limit, or of the machine's memory, that are still free; the plan leaves a sixteenth."""
_SHORT_BYTES: Final = 256 * MIB
_CRITICAL_BYTES: Final = 96 * MIB
"""On large machines these many bytes are enough, whatever share they are."""


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """What was read at a moment.

    Attributes:
        free: For the machine and each limited group: bytes in all, and bytes still free.
        events: How often limits were met since the start.
        some_percent: Highest share of ten seconds in which some process waited for memory.
        full_percent: The same for all processes at once.
    """

    free: tuple[tuple[int, int], ...] = ()
    events: int = 0
    some_percent: float = 0.0
    full_percent: float = 0.0


def judge(now: Readings, before: Readings) -> PressureLevel:
    """Return how bad it is.

    A limit that was met counts only while little is free besides: reading files meets it too, and gives back at once.
    """
    short = [free < min(total * _SHORT_SHARE, _SHORT_BYTES) for total, free in now.free]
    critical = [free < min(total * _CRITICAL_SHARE, _CRITICAL_BYTES) for total, free in now.free]
    if any(critical) or now.full_percent >= _FULL_PERCENT:
        return "critical"
    met = now.events > before.events and any(free < 2 * total * _SHORT_SHARE for total, free in now.free)
    return "short" if any(short) or met or now.some_percent >= _SOME_PERCENT else "none"


def read_pressure(root: Path = Path("/")) -> Readings:
    """Read MemAvailable, the limited groups and the pressure files, as far as the kernel has them.

    Args:
        root: Where ``proc`` and ``sys`` are mounted; a test gives a directory of its own.
    """
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE))
    free = [(int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024)] if "MemAvailable" in sizes else []
    levels = memory_levels(root)
    stalls = [read_text(path) for path in pressure_files(root)]
    return Readings(
        free=(*free, *((level.limit_bytes, level.free_bytes) for level in levels)),
        events=sum(level.events for level in levels),
        some_percent=_highest(stalls, "some"),
        full_percent=_highest(stalls, "full"),
    )


class MemoryGuard:
    """Watches for pressure and gives memory up.

    Args:
        prefixes: The cache that goes first; it comes back with its own bound.
        forget: Gives back what ended requests left besides.
        read: Reads; called once a second at most.
        clock: Monotonic seconds.

    Attributes:
        level: How bad it was at the last look.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        *,
        forget: Callable[[], None] = lambda: None,
        read: Callable[[], Readings] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.level: PressureLevel = "none"
        self._prefixes = prefixes
        self._forget = forget
        self._prefix_bytes = prefixes.max_bytes
        self._read = read
        self._clock = clock
        self._readings = read()
        self._looked_s = clock()
        self._calm_s = self._looked_s

    def tend(self) -> None:
        """Look, if the last look is old, and drop the prefix cache or let it grow again."""
        now = self._clock()
        if now - self._looked_s < _INTERVAL_S:
            return
        before, self._readings, self._looked_s = self._readings, self._read(), now
        level = judge(self._readings, before)
        if level != "none":
            self._calm_s = now + _RECOVERY_S
            if self._prefixes.max_bytes:
                logger.warning("memory is %s: the prefix cache gives up %d bytes", level, self._prefixes.nbytes)
                self._prefixes.resize(0)
                self._forget()
        elif now >= self._calm_s:
            self._prefixes.max_bytes = self._prefix_bytes
        if level != self.level:
            logger.info("memory pressure is now: %s", level)
        self.level = level

    def admit(self) -> None:
        """Look, and refuse a new request if memory is critically short.

        Raises:
            RequestError: With code 503 and when to try again.
        """
        self.tend()
        if self.level == "critical":
            raise RequestError(
                "memory is critically short on this machine; no new request is taken",
                code=503,
                retry_after_s=RETRY_AFTER_S,
                hint="try again in a moment, or free memory on the box",
            )


def _highest(texts: list[str], kind: str) -> float:
    found = [re.search(rf"^{kind} avg10=([0-9.]+)", text, re.MULTILINE) for text in texts]
    return max((float(match.group(1)) for match in found if match), default=0.0)
