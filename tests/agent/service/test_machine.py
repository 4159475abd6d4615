"""Pressure and throttling, read from a kernel's files that lie in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamplighter_agent.service.machine import Throttling, read_pressure


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_pressure_is_the_ten_seconds_average(tmp_path: Path) -> None:
    put(
        tmp_path,
        "proc/pressure/memory",
        "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.25 avg60=0.00 avg300=0.00 total=1\n",
    )
    assert read_pressure("memory", tmp_path) == (12.5, 3.25)


def test_a_kernel_without_pressure_says_nothing(tmp_path: Path) -> None:
    assert read_pressure("cpu", tmp_path) == (None, None)


def test_throttling_is_told_when_the_count_has_grown(tmp_path: Path) -> None:
    count = "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    put(tmp_path, count, "5\n")
    throttling = Throttling(tmp_path)
    assert throttling.seen() is False
    put(tmp_path, count, "6\n")
    assert throttling.seen() is True
    assert throttling.seen() is False


@pytest.mark.parametrize(("flags", "throttled"), [("0", False), ("50005", True), ("50000", False)])
def test_a_raspberry_pi_tells_by_flags(tmp_path: Path, flags: str, throttled: bool) -> None:
    put(tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", f"{flags}\n")
    assert Throttling(tmp_path).seen() is throttled


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert Throttling(tmp_path).seen() is None
