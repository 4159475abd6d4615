"""Asks for the unit's memory limits: what the plan needs while a package serves, the whole share while packages change.

The agent may not touch its own control group. It writes what it wants into its runtime directory; a path unit notices
that and a small root helper (``systemd/lamplighter-limits``) sets ``MemoryHigh`` and ``MemoryMax`` within the share
that the unit's file gives. Where there is no such helper nothing changes and nothing waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from lamplighter_agent.engine.cgroup import memory_levels
from lamplighter_agent.engine.memory import MIB, MemoryPlan
from lamplighter_agent.package.durable import write_file

logger = logging.getLogger(__name__)

REQUEST_NAME: Final = "memory"
SHARE: Final = "share\n"
_DIRECTORY: Final = "RUNTIME_DIRECTORY"
_SLACK: Final = 1.15
_MAIN_PROCESS_BYTES: Final = 96 * MIB
_HIGH_SHARE: Final = 0.95
_WAIT_S: Final = 5.0
_POLL_S: Final = 0.02

_SET_BY_HELPER: Final = "run/systemd/system.control/{}.d/50-MemoryMax.conf"
"""Where systemd keeps what ``systemctl set-property --runtime`` said, in bytes or as a share."""

_ASK_AGAIN_S: Final = 1.0
"""A path unit does not see a request that is written while its helper is ending."""


class MemoryBounds(NamedTuple):
    """``MemoryHigh`` and ``MemoryMax`` in bytes."""

    high_bytes: int
    max_bytes: int


def memory_bounds(plan: MemoryPlan) -> MemoryBounds:
    """Return what a unit needs that serves with ``plan``: all that is planned, the main process, and some slack.

    A new plan within these bounds could be a smaller one: before the next plan is made the unit has its share again.
    """
    most_mb = -(-round(plan.total_bytes * _SLACK + _MAIN_PROCESS_BYTES) // MIB)
    return MemoryBounds(round(most_mb * _HIGH_SHARE) * MIB, most_mb * MIB)


class MemoryLimits:
    """What this process asks of the unit's limits; everything runs in the agent's event loop.

    Args:
        request: File that the helper's path unit watches, or None where there is no helper.
        limit_bytes: Reads the limit in force; None means that there is none.
        granted_bytes: What the helper set for an agent that has just ended, or None: its limit may still be in force.
    """

    def __init__(
        self,
        request: Path | None = None,
        limit_bytes: Callable[[], int | None] = lambda: _own_limit_bytes(),
        granted_bytes: int | None = None,
    ) -> None:
        self._request = request
        self._limit_bytes = limit_bytes
        self._plan: MemoryPlan | None = None
        self._holders = 0
        self._asked = ""
        self._narrow_bytes = granted_bytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> MemoryLimits:
        """Ask in the runtime directory that systemd made, if it did."""
        directory = environment.get(_DIRECTORY)
        if not directory:
            return cls()
        return cls(Path(directory.split(":")[0]) / REQUEST_NAME, granted_bytes=granted_bytes())

    def serve(self, plan: MemoryPlan | None) -> None:
        """Say with which plan a package serves now; None when none does."""
        self._plan = plan
        self._ask()

    def hold_share(self) -> None:
        """Ask for the whole share until ``let_go`` was called as often: packages change, or two run."""
        self._holders += 1
        self._ask()

    def let_go(self) -> None:
        """End what ``hold_share`` began."""
        self._holders -= 1
        self._ask()

    @contextlib.asynccontextmanager
    async def share(self) -> AsyncIterator[None]:
        """Hold the whole share in the block."""
        await self.begin_share()
        try:
            yield
        finally:
            self.let_go()

    async def begin_share(self) -> None:
        """Hold the whole share; returns when it is granted, or after a bounded wait."""
        self.hold_share()
        try:
            await self._granted()
        except asyncio.CancelledError:
            self.let_go()
            raise

    async def _granted(self) -> None:
        asked_s = time.monotonic()
        end_s = asked_s + _WAIT_S
        while self._narrow_bytes is not None and self._limit_bytes() == self._narrow_bytes:
            now = time.monotonic()
            if now > end_s:
                logger.warning("the unit's memory limits were not widened within %g s; going on", _WAIT_S)
                return
            if now - asked_s > _ASK_AGAIN_S:
                asked_s, self._asked = now, ""
                self._ask()
            await asyncio.sleep(_POLL_S)
        self._narrow_bytes = None

    def _ask(self) -> None:
        if self._request is None:
            return
        bounds = memory_bounds(self._plan) if self._plan is not None and not self._holders else None
        text = SHARE if bounds is None else f"{bounds.high_bytes} {bounds.max_bytes}\n"
        if text == self._asked:
            return
        try:
            write_file(self._request, text.encode())
        except OSError as error:
            logger.warning("the unit's memory limits cannot be asked for: %s", error)
            return
        self._asked = text
        if bounds is not None:
            self._narrow_bytes = bounds.max_bytes


def granted_bytes(root: Path = Path("/")) -> int | None:
    """Return the ``MemoryMax`` that the helper has set for this process's unit until the next boot, or None.

    Args:
        root: Where ``proc`` and ``run`` are; a test gives a directory of its own.
    """
    try:
        unit = Path((root / "proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition(":")[2]).name
        text = (root / _SET_BY_HELPER.format(unit)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^MemoryMax=(\d{1,18})$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _own_limit_bytes() -> int | None:
    levels = memory_levels(Path("/"))
    return levels[0].limit_bytes if levels else None
