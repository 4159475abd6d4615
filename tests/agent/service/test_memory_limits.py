"""What the agent asks of its unit's memory limits, and what the helper's script makes of it, without systemd."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from lamplighter_agent.engine.memory import MIB, MemoryPlan
from lamplighter_agent.service import memory_limits
from lamplighter_agent.service.memory_limits import SHARE, MemoryLimits, granted_bytes, memory_bounds

ROOT = Path(__file__).parents[3]
GIB = 1024 * MIB


PLAN = MemoryPlan(
    budget_bytes=12 * GIB,
    runtime_bytes=88 * MIB,
    weights_bytes=150 * MIB,
    scratch_bytes=64 * MIB,
    headroom_bytes=768 * MIB,
    kv_bytes_per_token=46_080,
    kv_tokens=16_384,
    max_context_tokens=4_096,
    slots=4,
    prefill_chunk_tokens=512,
    prefix_cache_bytes=256 * MIB,
)


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def test_bounds_hold_the_plan_and_the_main_process_but_not_the_machines_headroom() -> None:
    high, most = memory_bounds(PLAN)
    assert PLAN.total_bytes + 60 * MIB < high < most < PLAN.total_bytes + PLAN.headroom_bytes


def test_the_plan_is_asked_for_while_a_package_serves_and_the_share_while_packages_change(request_file: Path) -> None:
    def asked() -> str:
        return request_file.read_text()

    async def story() -> list[str]:
        limits = MemoryLimits(request_file, lambda: None)
        said = []
        async with limits.share():
            said.append(asked())
            limits.serve(PLAN)
            said.append(asked())
        said.append(asked())
        limits.hold_share()
        said.append(asked())
        limits.let_go()
        limits.serve(None)
        said.append(asked())
        return said

    high, most = memory_bounds(PLAN)
    assert asyncio.run(story()) == [SHARE, SHARE, f"{high} {most}\n", SHARE, SHARE]


def test_a_change_waits_until_the_narrow_limit_is_gone(request_file: Path) -> None:
    async def story() -> None:
        limits = MemoryLimits(request_file, lambda: in_force[0])
        limits.serve(PLAN)
        changing = asyncio.create_task(limits.begin_share())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not changing.done()
        in_force[0] = 8 * GIB
        await asyncio.wait_for(changing, 4)

    in_force = [memory_bounds(PLAN).max_bytes]
    asyncio.run(story())
    assert request_file.read_text() == SHARE


def test_the_first_plan_after_a_quick_restart_waits_for_the_limit_of_the_agent_before_to_go(
    request_file: Path,
) -> None:
    seen = [300 * MIB, 300 * MIB, 8 * GIB]

    async def story() -> list[int]:
        async with MemoryLimits(request_file, lambda: seen.pop(0), granted_bytes=300 * MIB).share():
            return list(seen)

    assert asyncio.run(story()) == []
    assert request_file.read_text() == SHARE


@pytest.mark.parametrize(("setting", "granted"), [("479199232", 479_199_232), ("80%", None), ("infinity", None)])
def test_what_the_helper_granted_is_read_from_systemds_settings(
    tmp_path: Path, setting: str, granted: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/lamplighter-agent.service\n")
    assert granted_bytes(tmp_path) is None
    folder = tmp_path / "run/systemd/system.control/lamplighter-agent.service.d"
    folder.mkdir(parents=True)
    (folder / "50-MemoryMax.conf").write_text(f"# made by systemctl\n[Service]\nMemoryMax={setting}\n")
    assert granted_bytes(tmp_path) == granted


def test_a_request_that_the_helper_missed_is_made_again(request_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "_ASK_AGAIN_S", 0.0)

    missed: list[str] = []

    def limit_bytes() -> int:
        if not missed:
            missed.append(request_file.read_text())
            request_file.unlink()
        return 8 * GIB if request_file.exists() else memory_bounds(PLAN).max_bytes

    limits = MemoryLimits(request_file, limit_bytes)
    limits.serve(PLAN)
    asyncio.run(limits.begin_share())
    assert (missed, request_file.read_text()) == ([SHARE], SHARE)


def test_without_a_helper_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MemoryLimits.from_environment({}).serve(PLAN)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_directory_that_is_full_or_gone_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MemoryLimits.from_environment({"RUNTIME_DIRECTORY": str(tmp_path / "gone")}).serve(None)
    assert "memory limits cannot be asked for" in caplog.text


def run_helper(tmp_path: Path, request_file: Path, unit: Path | None = None, status: int = 0) -> str:
    """Run the helper with a systemctl that writes down what it is told, and ends with ``status``."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" >>"$0.log"\nexit {status}\n')
    systemctl.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "LAMPLIGHTER_SYSTEMCTL": str(systemctl),
        "LAMPLIGHTER_REQUEST": str(request_file),
        "LAMPLIGHTER_UNIT_FILE": str(unit or ROOT / "systemd" / "lamplighter-agent.service"),
    }
    result = subprocess.run(
        [ROOT / "systemd" / "lamplighter-limits"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (status, "")
    log = tmp_path / "systemctl.log"
    return log.read_text() if log.exists() else ""


SHARE_PROPERTIES = "set-property --runtime lamplighter-agent.service MemoryHigh=75% MemoryMax=80%\n"


def test_the_helper_sets_what_is_asked(tmp_path: Path, request_file: Path) -> None:
    request_file.write_text(f"{190 * MIB} {200 * MIB}\n")
    said = run_helper(tmp_path, request_file)
    assert said == (f"set-property --runtime lamplighter-agent.service MemoryHigh={190 * MIB} MemoryMax={200 * MIB}\n")


@pytest.mark.parametrize(
    "request_text",
    [
        SHARE,
        "",
        "1 2\n",  # less than any agent needs
        f"{300 * MIB} {200 * MIB}\n",
        f"{190 * MIB} {10**15 - 1}\n",  # more than the share
        f"{190 * MIB} {10**40}\n",
        f"{190 * MIB} 0{200 * MIB}\n",
        f"{190 * MIB} {200 * MIB} IPAddressDeny=any\n",
        f"{190 * MIB} $(reboot)\n",
        "infinity infinity\n",
        "-1 -1\n",
        f"x\n{190 * MIB} {200 * MIB}\n",
        "9" * 100_000,
        "\x00\x01\xff \n",
    ],
)
def test_whatever_else_is_asked_means_the_units_share(tmp_path: Path, request_file: Path, request_text: str) -> None:
    request_file.write_text(request_text)
    assert run_helper(tmp_path, request_file) == SHARE_PROPERTIES


def test_an_agent_that_has_ended_leaves_the_share(tmp_path: Path, request_file: Path) -> None:
    assert run_helper(tmp_path, request_file) == SHARE_PROPERTIES


def test_a_link_in_place_of_the_request_is_not_followed(tmp_path: Path, request_file: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(f"{190 * MIB} {200 * MIB}\n")
    request_file.symlink_to(elsewhere)
    assert run_helper(tmp_path, request_file) == SHARE_PROPERTIES


def test_a_pipe_in_place_of_the_request_is_not_waited_for(tmp_path: Path, request_file: Path) -> None:
    os.mkfifo(request_file)
    assert run_helper(tmp_path, request_file) == SHARE_PROPERTIES


def test_limits_that_a_person_has_set_are_left_alone(tmp_path: Path, request_file: Path) -> None:
    unit = tmp_path / "lamplighter-agent.service"
    unit.write_text((ROOT / "systemd" / "lamplighter-agent.service").read_text())
    drop_in = tmp_path / "lamplighter-agent.service.d" / "mine.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nMemoryMax=1G\n")
    request_file.write_text(f"{190 * MIB} {200 * MIB}\n")
    assert run_helper(tmp_path, request_file, unit) == ""


@pytest.mark.parametrize(
    "text", [None, "", "[Service]\nMemoryHigh=75%\n", "[Service]\nMemoryHigh=75%\nMemoryMax=900M\n"]
)
def test_a_unit_without_shares_is_left_alone(tmp_path: Path, request_file: Path, text: str | None) -> None:
    unit = tmp_path / "unit.service"
    if text is not None:
        unit.write_text(text)
    request_file.write_text("100000000 200000000\n")
    assert run_helper(tmp_path, request_file, unit) == ""


def test_a_systemd_that_refuses_fails_the_helper_which_is_then_tried_again(tmp_path: Path, request_file: Path) -> None:
    request_file.write_text("share\n")
    assert run_helper(tmp_path, request_file, status=1) == SHARE_PROPERTIES
