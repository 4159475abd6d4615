"""What an agent that does not stay up does about it: the previous package, then none, and always an answer over MQTT.

systemd starts an agent that died again, up to its limit. Each start is counted on the disk before anything is loaded
and forgiven once the agent has run for a while or was stopped in order. A start under another boot of the machine
begins a new count: a power cut is not the package's fault.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, Literal

import msgspec

from lamplighter_agent.package.durable import make_directory, storage_errors, write_file

logger = logging.getLogger(__name__)

STARTS_NAME: Final = "starts.json"
PREVIOUS_AFTER: Final = 3
SAFE_MODE_AFTER: Final = 6
FORGIVEN_AFTER_S: Final = 60.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

StartMode = Literal["normal", "previous_package", "safe_mode"]


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    machine_boot: str = ""
    short_lived: int = 0


class StartCounter:
    """Counts starts that did not last; it counts the present one when it is made.

    Args:
        state_dir: The agent's own directory.
        machine_boot: Name of the machine's present boot.

    Attributes:
        short_lived: Starts in a row, before this one, that ended early.

    Raises:
        StoreError: If the state directory cannot be written.
    """

    def __init__(self, state_dir: Path, machine_boot: str | None = None) -> None:
        self._path = state_dir / STARTS_NAME
        self._machine_boot = _machine_boot() if machine_boot is None else machine_boot
        with storage_errors(f"counting the start in {self._path}"):
            make_directory(state_dir)
            before = self._read()
            self.short_lived = before.short_lived if before.machine_boot == self._machine_boot else 0
            self._write(self.short_lived + 1)

    @property
    def mode(self) -> StartMode:
        """What to run this time: ``previous_package`` is said once, for the start that shall roll back."""
        if self.short_lived >= SAFE_MODE_AFTER:
            return "safe_mode"
        return "previous_package" if self.short_lived == PREVIOUS_AFTER else "normal"

    def forgive(self) -> None:
        """This start has lasted, or ends in order: the next one begins a new count.

        Raises:
            StoreError: If the file system refuses.
        """
        with storage_errors(f"writing {self._path}"):
            self._write(0)

    def _read(self) -> _Record:
        if not self._path.exists():
            return _Record()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Record)
        except msgspec.DecodeError as error:
            logger.warning("%s is damaged and counts as new: %s", self._path, error)
            return _Record()

    def _write(self, short_lived: int) -> None:
        write_file(self._path, msgspec.json.encode(_Record(machine_boot=self._machine_boot, short_lived=short_lived)))


def _machine_boot() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
