"""What Linux tells about the machine beyond psutil: pressure and throttling.

Every figure is None where the kernel, the hardware or the sandbox does not tell it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, NamedTuple

_ROOT: Final = Path("/")
_RASPBERRY_THROTTLED_NOW: Final = 0x0F  # under-voltage, frequency capped, throttled, soft temperature limit


class Pressure(NamedTuple):
    """Share of the last ten seconds in percent in which somebody, or everybody, waited for a resource (PSI)."""

    some_percent: float | None
    full_percent: float | None


def read_pressure(resource: Literal["cpu", "memory", "io"], root: Path = _ROOT) -> Pressure:
    """Return the pressure on a resource from ``/proc/pressure``."""
    text = _read(root / "proc" / "pressure" / resource)
    found = {line.split()[0]: re.search(r"avg10=([0-9.]+)", line) for line in text.splitlines() if line}
    some, full = found.get("some"), found.get("full")
    return Pressure(float(some[1]) if some else None, float(full[1]) if full else None)


class Throttling:
    """Tells whether the CPU was slowed down for heat or power since it was asked last."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._count = self._events()

    def seen(self) -> bool | None:
        """Return whether, or None where nothing tells."""
        flags = _read(self._root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
        if flags:  # a Raspberry Pi
            return bool(int(flags, 16) & _RASPBERRY_THROTTLED_NOW)
        before, self._count = self._count, self._events()
        if self._count is None:
            return None
        return self._count > (before or 0)

    def _events(self) -> int | None:
        """Return the throttle events of all cores since the machine's start (x86)."""
        places = (self._root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
        counts = [int(text) for place in places if (text := _read(place).strip()).isdigit()]
        return sum(counts) if counts else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
