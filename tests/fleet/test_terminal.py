"""What the operator sees, as text."""

from __future__ import annotations

import json

from lamplighter_agent.service.messages import ReportedMessage, StatusMessage
from lamplighter_agent.update.states import UpdateState
from lamplighter_fleet.devices import Device, FleetView
from lamplighter_fleet.push import Outcome
from lamplighter_fleet.terminal import BAR_WIDTH, Board, bar, device_table, outcome_line, report_line


def report(state: UpdateState, **values: object) -> ReportedMessage:
    fields: dict[str, object] = {"id": "w", "state": state, "package": "tiny", "version": "1", "active": None}
    return ReportedMessage(**{**fields, **values})  # type: ignore[arg-type]


def test_a_bar_fills_from_nothing_to_all() -> None:
    assert bar(0, 100) == "." * BAR_WIDTH
    assert bar(100, 100) == bar(200, 100) == "#" * BAR_WIDTH
    assert bar(50, 100) == "#" * (BAR_WIDTH // 2) + "." * (BAR_WIDTH // 2)
    assert bar(0, 0) == "." * BAR_WIDTH


def test_a_download_has_a_bar_and_a_failure_its_reason() -> None:
    line = report_line(report(UpdateState.DOWNLOADING, bytes_done=1 << 20, bytes_total=4 << 20))
    assert line.startswith("tiny/1 downloading [######..................]  25% 1.0 of 4.0 MiB")
    failed = report_line(report(UpdateState.FAILED, reason="disk_full", message="no room"))
    assert failed.startswith("tiny/1 failed: disk_full: no room")


def test_a_device_that_only_said_that_it_is_gone() -> None:
    status = StatusMessage(state="offline", boot=1, connection=1, agent="0.1.0", reason="connection_lost")
    heading, row = device_table([Device("box1", status=status)], 0.0)
    assert row.split() == ["box1", "offline", *["-"] * 9]
    assert heading.index("STATE") == row.index("offline")


def test_safe_mode_stands_in_the_table() -> None:
    status = StatusMessage(state="online", boot=1, connection=1, agent="0.1.0", reason="safe_mode")
    assert device_table([Device("box1", status=status)], 0.0)[1].split()[1] == "safe_mode"


def test_a_board_is_drawn_over_itself_and_lines_scroll_above_it() -> None:
    board = Board()
    assert board.draw([], ["a", "b"]) == "a\nb\n"
    assert board.draw(["stays"], ["a"]) == "\x1b[2A\x1b[Jstays\na\n"
    assert board.draw([], []) == "\x1b[1A\x1b[J"


def test_a_silent_device_says_whether_it_is_there() -> None:
    assert "never seen" in outcome_line(Outcome(device="box1"))
    assert "offline" in outcome_line(Outcome(device="box1", online=False))


def test_batches_of_telemetry_are_read_and_late_ones_do_not_win() -> None:
    view = FleetView("p")
    numbers = dict.fromkeys(
        ("boot", "worker_restarts", "queue_depth", "requests_active", "requests_total", "requests_refused",
         "requests_failed", "prompt_tokens_total", "generated_tokens_total", "agent_rss_bytes", "memory_total_bytes",
         "memory_available_bytes", "disk_free_bytes", "cpu_percent", "load_1m", "uptime_s"), 1,
    )  # fmt: skip
    words = {"agent": "1", "package": "p/1", "update_state": "idle", "worker": "ready"}
    unknown = dict.fromkeys(
        ("generated_tokens_per_s", "prompt_tokens_per_s", "time_to_first_token_s", "worker_rss_bytes",
         "worker_peak_rss_bytes"),
    )  # fmt: skip

    def sample(time_unix_s: float) -> str:
        return json.dumps({**numbers, **words, **unknown, "time_unix_s": time_unix_s})

    topic = "p/device/a/telemetry"
    assert view.take(topic, f"[{sample(5.0)}, {sample(9.0)}]".encode()) is not None
    assert view.take(topic, sample(7.0).encode()) is None
    telemetry = view.devices["a"].telemetry
    assert telemetry is not None
    assert telemetry.time_unix_s == 9.0
    assert view.take(topic, b"[]") is None
