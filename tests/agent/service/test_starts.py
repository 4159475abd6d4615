"""An agent that does not stay up: what is counted, what follows, what is forgiven."""

from __future__ import annotations

from pathlib import Path

from lamplighter_agent.service.starts import STARTS_NAME, StartCounter


def modes(state: Path, count: int, boot: str = "boot-1") -> list[str]:
    return [StartCounter(state, boot).mode for _ in range(count)]


def test_after_three_short_lives_the_previous_package_after_six_none(tmp_path: Path) -> None:
    assert modes(tmp_path, 8) == [
        *["normal"] * 3,
        "previous_package",
        *["normal"] * 2,
        "safe_mode",
        "safe_mode",
    ]


def test_a_start_that_lasted_begins_a_new_count(tmp_path: Path) -> None:
    modes(tmp_path, 2)
    StartCounter(tmp_path, "boot-1").forgive()
    assert StartCounter(tmp_path, "boot-1").short_lived == 0


def test_power_cuts_are_not_counted(tmp_path: Path) -> None:
    assert [StartCounter(tmp_path, f"boot-{number}").mode for number in range(8)] == ["normal"] * 8


def test_a_damaged_count_is_a_new_one(tmp_path: Path) -> None:
    modes(tmp_path, 3)
    (tmp_path / STARTS_NAME).write_bytes(b"\0\xff")
    assert StartCounter(tmp_path, "boot-1").short_lived == 0
