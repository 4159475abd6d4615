"""The shipped units as systemd itself sees them, offline: nothing is booted."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.service.memory_limits import REQUEST_NAME
from lamplighter_agent.service.starts import SAFE_MODE_AFTER

UNITS = Path(__file__).parents[1] / "systemd"
SERVICE = UNITS / "lamplighter-agent.service"
LIMITS = UNITS / "lamplighter-limits.service"
HIGHEST_EXPOSURE = {SERVICE: 13, LIMITS: 20}  # tenths; the second must be root and may ask systemd
ANALYZE = shutil.which("systemd-analyze")

needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
@pytest.mark.parametrize("unit", HIGHEST_EXPOSURE, ids=lambda unit: unit.stem)
def test_the_services_expose_little(unit: Path) -> None:
    result = analyze("security", "--offline=true", f"--threshold={HIGHEST_EXPOSURE[unit]}", str(unit))
    assert result.returncode == 0, result.stdout


@needs_systemd
def test_the_units_are_well_formed(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    names = [unit.name for unit in UNITS.glob("*.*") if unit.suffix in {".service", ".socket", ".path"}]
    for name in names:  # the programs are not installed here, and systemd looks whether they are there
        text = re.sub(r"^ExecStart=/opt/\S+", f"ExecStart={program}", (UNITS / name).read_text(), flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    result = analyze("verify", "--man=no", *(str(tmp_path / name) for name in names))
    assert (len(names), result.returncode, result.stderr) == (4, 0, "")


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


def test_a_helper_that_could_not_start_is_started_again_and_never_often_enough_to_end_its_path_unit() -> None:
    helper = settings(LIMITS)
    assert helper["Restart"] == ["on-failure"]
    retries = int(helper["StartLimitIntervalSec"][0]) / int(helper["RestartSec"][0])
    # Besides retries, each start of the agent asks three times: by its end, its share, its plan.
    starts = 3 * int(helper["StartLimitIntervalSec"][0]) / int(settings(SERVICE)["RestartSec"][0])
    assert retries + starts < int(helper["StartLimitBurst"][0])


def test_the_socket_is_where_the_agent_looks() -> None:
    configured = (UNITS.parent / "configs" / "agent.yaml").read_text()
    (path,) = settings(UNITS / "lamplighter-agent.socket")["ListenStream"]
    assert f"socket: {path}\n" in configured


def test_the_helper_watches_where_the_agent_asks() -> None:
    (directory,) = settings(SERVICE)["RuntimeDirectory"]
    (path,) = settings(UNITS / "lamplighter-limits.path")["PathChanged"]
    helper = (UNITS / "lamplighter-limits").read_text()
    assert path == f"/run/{directory}/{REQUEST_NAME}"
    assert f"{{LAMPLIGHTER_REQUEST:-{path}}}" in helper
    for name in ("MemoryHigh", "MemoryMax"):  # the helper reads the unit's share as a percentage
        assert re.fullmatch(r"[1-9][0-9]%", settings(SERVICE)[name][0])
