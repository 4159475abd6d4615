"""Whether everything that must not hang is well: only then is the service manager's watchdog fed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

logger = logging.getLogger(__name__)

NETWORK_SILENCE_S: Final = 60.0
_PROBE_INTERVAL_S: Final = 30.0
_PROBE_NAME: Final = ".alive"


class Network(Protocol):
    """What talks to the broker."""

    @property
    def silent_s(self) -> float:
        """How long it has given no sign of life."""


class Liveness:
    """Looks at the broker's thread, the engine's supervisor and the disk; the event loop shows itself by asking.

    Args:
        state_dir: Where the disk is tried: a small file is written and synced.
        network: What talks to the broker, or None.
        engine_is_watched: False if an engine should run and nobody looks after it any more.
        probe: Writes the small file; tests put one in its place.
    """

    def __init__(
        self,
        state_dir: Path,
        network: Network | None,
        engine_is_watched: Callable[[], bool],
        probe: Callable[[Path], None] | None = None,
    ) -> None:
        self._path = state_dir / _PROBE_NAME
        self._network = network
        self._engine_is_watched = engine_is_watched
        self._probe = probe or _write_and_sync
        self._probing: asyncio.Task[None] | None = None
        self._next_probe_s = 0.0

    def fault(self, disk_silence_s: float) -> str | None:
        """Return what hangs, or None.

        Args:
            disk_silence_s: Longest time that writing a small file may take.
        """
        if self._network is not None and self._network.silent_s > NETWORK_SILENCE_S:
            return "the MQTT network thread hangs"
        if not self._engine_is_watched():
            return "nobody watches the engine any more"
        now = time.monotonic()
        if self._probing is not None and not self._probing.done():
            begun_s = self._next_probe_s - _PROBE_INTERVAL_S
            return f"the disk with {self._path.parent} does not answer" if now - begun_s > disk_silence_s else None
        if now >= self._next_probe_s:
            self._next_probe_s = now + _PROBE_INTERVAL_S
            self._probing = asyncio.create_task(self._try_disk(), name="disk-probe")
        return None

    async def stop(self) -> None:
        """End the probe under way, if it lets itself be ended."""
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing

    async def _try_disk(self) -> None:
        try:
            await asyncio.to_thread(self._probe, self._path)
        except OSError as error:
            # It answers: a full or read-only disk is not mended by a restart, and prompts need no disk.
            logger.error("the disk refuses a small file in %s: %s", self._path.parent, error)  # noqa: TRY400


def _write_and_sync(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(b"alive\n")
        stream.flush()
        os.fsync(stream.fileno())
