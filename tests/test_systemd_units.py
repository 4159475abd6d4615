"""The shipped units as systemd itself sees them, offline: nothing is booted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.service.starts import SAFE_MODE_AFTER

UNITS = Path(__file__).parents[1] / "systemd"
SERVICE = UNITS / "lamplighter-agent.service"
HIGHEST_EXPOSURE = 13  # tenths
ANALYZE = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_the_service_exposes_little() -> None:
    result = analyze("security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE}", str(SERVICE))
    assert result.returncode == 0, result.stdout


@needs_systemd
def test_the_units_are_well_formed(tmp_path: Path) -> None:
    program = tmp_path / "lamplighter-agent"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS.glob("*.s*"):  # the program is not installed here, and systemd looks whether it is there
        text = unit.read_text().replace("/opt/lamplighter/current/bin/lamplighter-agent", str(program))
        (tmp_path / unit.name).write_text(text.replace("file:/opt/lamplighter/README.md", "https://example.com"))
    result = analyze("verify", "--man=no", *(str(tmp_path / name) for name in ("lamplighter-agent.service",)))
    assert (result.returncode, result.stderr) == (0, "")


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_systemd_gives_up_only_after_the_agents_own_remedies() -> None:
    unit = settings(SERVICE)
    assert int(unit["StartLimitBurst"][0]) > SAFE_MODE_AFTER
    slowest_s = int(unit["StartLimitBurst"][0]) * (int(unit["RestartSec"][0]) + int(unit["WatchdogSec"][0]))
    assert int(unit["StartLimitIntervalSec"][0]) >= slowest_s
    assert unit["RestartPreventExitStatus"] == [str(ConfigError.exit_code)]


def test_the_socket_is_where_the_agent_looks() -> None:
    configured = (UNITS.parent / "configs" / "agent.yaml").read_text()
    (path,) = settings(UNITS / "lamplighter-agent.socket")["ListenStream"]
    assert f"socket: {path}\n" in configured
