"""What the operator sees: tables, lines and progress bars as text. Pure; who prints decides where.

Every word and number of a device is taken as untrusted: whatever it sends, a line stays one line.
"""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from lamplighter_agent.service.messages import FinalReply, ReportedMessage
from lamplighter_agent.update.states import UpdateState
from lamplighter_fleet.devices import Device
from lamplighter_fleet.push import Outcome
from lamplighter_fleet.untrusted import plain
from lamplighter_fleet.watch import Change

MIB: Final = 1024 * 1024
BAR_WIDTH: Final = 24
_HEADINGS: Final = (
    "DEVICE", "STATE", "PACKAGE", "ENGINE", "UPDATE", "QUEUE", "TOKENS/S", "FIRST TOKEN", "MEMORY", "TEMP", "SEEN",
)  # fmt: skip
_NUMBERS_FROM: Final = 5
_MAX_CELL: Final = 40
_MAX_FIGURE: Final = 10**15


def device_table(devices: Iterable[Device], now_unix_s: float) -> list[str]:
    """Return a table of devices, as wide as what stands in it."""
    cells = (_device_cells(device, now_unix_s) for device in devices)
    rows = [_HEADINGS, *(tuple(plain(cell, _MAX_CELL) for cell in row) for row in cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return [
        "  ".join(
            cell.rjust(width) if column >= _NUMBERS_FROM else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bar(done: int, total: int) -> str:
    """Return a progress bar."""
    filled = BAR_WIDTH * _bounded(done, total) // max(total, 1)
    return "#" * filled + "." * (BAR_WIDTH - filled)


def report_line(report: ReportedMessage) -> str:
    """Return an update's state in one line."""
    line = f"{report.package}/{report.version} {report.state.value}"
    if report.state is UpdateState.DOWNLOADING and report.bytes_total > 0:
        done, total = _bounded(report.bytes_done, report.bytes_total), report.bytes_total
        amount = f"{_figure(done, '{:.1f}', MIB)} of {_figure(total, '{:.1f} MiB', MIB)}"
        line += f" [{bar(done, total)}] {100 * done // total:3}% {amount}"
    if report.reason is not None:
        line += f": {report.reason}: {report.message}"
    return f"{plain(line)}, {_figure(report.duration_s, '{:.1f} s')}"


def change_line(change: Change) -> str | None:
    """Return what happened in one line; None for what is not worth one (a sample of telemetry)."""
    device = change.device
    match change.leaf:
        case "status" if device.status is not None:
            status = device.status
            text = f"{status.state}, start {status.boot}, agent {status.agent}, {status.package or 'no package'}"
            text += f" ({status.reason})" if status.reason else ""
        case "reported" if device.reported is not None:
            text = report_line(device.reported)
        case "event" if device.event is not None:
            text = f"{device.event.name}: {device.event.message}"
        case _:
            return None
    return f"{device.id:20} {plain(text)}"


def outcome_line(outcome: Outcome) -> str:
    """Return how a push ended on a device."""
    report = outcome.report
    if report is None:
        known = {None: "never seen", True: "online, but silent", False: "offline: it follows when it comes back"}
        return f"{outcome.device:20} {known[outcome.online]}"
    line = f"{outcome.device:20} {report_line(report)}"
    return f"{line}\n{'':20}   {plain(report.hint)}" if report.hint else line


def summary(reply: FinalReply) -> str:
    """Return an answer's figures in one line."""
    usage, timings = reply.usage, reply.timings
    return plain(
        f"[{reply.model} on {reply.device}: {usage.prompt_tokens} + {usage.generated_tokens} tokens, first after "
        f"{timings.first_token_s:.3f} s, {timings.generated_tokens_per_s:.1f} tokens/s, {reply.finish_reason}]"
    )


class Board:
    """The last lines of a terminal, drawn again and again: what is at work now. Lines above it scroll away.

    Args:
        size: Tells the terminal's size. What does not fit could not be wiped, so that it is left out.
    """

    def __init__(self, size: Callable[[], os.terminal_size] = shutil.get_terminal_size) -> None:
        self._height = 0
        self._size = size

    def draw(self, above: Sequence[str], board: Sequence[str]) -> str:
        """Return what to write: the old board is wiped, lines that stay come above, then the new board."""
        wipe = f"\x1b[{self._height}A\x1b[J" if self._height else ""
        columns, lines = self._size()
        room = max(lines - 1, 2)
        if len(board) > room:
            board = [*board[: room - 1], f"... and {len(board) - room + 1} more lines"]
        board = [_cut(line, columns) for line in board]
        self._height = len(board)
        return wipe + "".join(f"{line}\n" for line in [*above, *board])


def _cut(line: str, columns: int) -> str:
    """Return as much of a line as fits into a terminal without being wrapped."""
    width = 0
    for index, character in enumerate(line):
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width > columns:
            return line[:index]
    return line


def _bounded(done: int, total: int) -> int:
    return max(0, min(done, total))


def _device_cells(device: Device, now_unix_s: float) -> tuple[str, ...]:
    sample, status = device.telemetry, device.status
    state = "online" if device.online else "offline"
    if status is not None and device.online and status.reason:
        state = status.reason
    return (
        device.id,
        state,
        (status.package if status else None) or "-",
        sample.worker if sample and device.online else "-",
        device.reported.state.value if device.reported else "-",
        "-" if sample is None else f"{sample.requests_active}+{sample.queue_depth}",
        _figure(sample.generated_tokens_per_s if sample else None, "{:.1f}"),
        _figure(sample.time_to_first_token_s if sample else None, "{:.3f} s"),
        _figure(sample.worker_rss_bytes if sample else None, "{:.0f} MiB", MIB),
        _figure(sample.temperature_celsius if sample else None, "{:.0f} C"),
        "-" if sample is None else _age(now_unix_s - sample.time_unix_s),
    )


def _age(seconds: float) -> str:
    if seconds < 0:
        return "now"
    seconds = min(seconds, _MAX_FIGURE)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(max(-_MAX_FIGURE, min(value, _MAX_FIGURE)) / unit)


def clock() -> str:
    """Return the time of day, for the beginning of a line."""
    return time.strftime("%H:%M:%S")
