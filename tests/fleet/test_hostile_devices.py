"""Devices in wrong hands: what they send reaches the operator's terminal as text, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from lamplighter_agent.errors import RequestError
from lamplighter_agent.service.message_codec import decode_reply
from lamplighter_agent.service.messages import ErrorReply, FinalReply
from lamplighter_fleet.cli import main
from lamplighter_fleet.devices import FleetView
from lamplighter_fleet.push import Outcome
from lamplighter_fleet.terminal import Board, change_line, device_table, outcome_line, summary
from lamplighter_fleet.untrusted import plain, prose, refusal, safe_json
from lamplighter_fleet.watch import LEAVES, Change
from support.broker import Broker, TestClient, mosquitto_path, running_broker

ACTING = "\x1b[2J\x1b]0;mine\x07\x9b31m\u202e\u2028\r\n13:00:00  box9  online"
HUGE = 10**4000
TELEMETRY: dict[str, object] = {
    **dict.fromkeys(
        ("boot", "worker_restarts", "queue_depth", "requests_active", "requests_total", "requests_refused",
         "requests_failed", "prompt_tokens_total", "generated_tokens_total", "agent_rss_bytes", "memory_total_bytes",
         "memory_available_bytes", "disk_free_bytes", "worker_rss_bytes", "worker_peak_rss_bytes"), HUGE,
    ),
    **dict.fromkeys(
        ("cpu_percent", "load_1m", "uptime_s", "generated_tokens_per_s", "prompt_tokens_per_s",
         "time_to_first_token_s", "temperature_celsius"), 1e308,
    ),
    "time_unix_s": -1e308, "agent": ACTING, "package": ACTING, "update_state": ACTING, "worker": ACTING,
}  # fmt: skip
REPORT = {"id": "w", "package": ACTING, "version": ACTING, "active": ACTING, "duration_s": 1e308}
STATUS = {"boot": HUGE, "connection": 1, "agent": ACTING, "package": ACTING, "groups": [ACTING], "reason": ACTING}
MESSAGES: list[tuple[str, dict[str, object]]] = [
    ("status", {**STATUS, "state": "online"}),
    ("status", {**STATUS, "state": "offline", "package": "p" * 20_000, "reason": "r" * 20_000}),
    ("reported", {**REPORT, "state": "failed", "reason": ACTING, "message": ACTING, "hint": ACTING}),
    ("reported", {**REPORT, "state": "downloading", "bytes_done": -HUGE, "bytes_total": 5}),
    ("reported", {**REPORT, "state": "downloading", "bytes_done": HUGE, "bytes_total": 3}),
    ("reported", {**REPORT, "state": "downloading", "bytes_done": 3, "bytes_total": HUGE}),
    ("reported", {**REPORT, "state": "downloading", "bytes_done": 3, "bytes_total": -HUGE}),
    ("telemetry", TELEMETRY),
    ("event", {"name": ACTING, "message": ACTING * 100, "time_unix_s": 1e308}),
]


@pytest.mark.parametrize(("leaf", "message"), MESSAGES)
def test_every_line_stays_one_harmless_line(leaf: Any, message: dict[str, object]) -> None:  # noqa: ANN401
    view = FleetView("p")
    device = view.take(f"p/device/box1/{leaf}", json.dumps(message).encode())
    assert device is not None
    assert leaf in LEAVES
    lines = device_table([device], 1.0)
    lines += [line for line in [change_line(Change(device, leaf, stored=False))] if line is not None]
    for line in lines:
        assert line.isprintable()
        assert len(line) < 700
    if device.reported is not None:
        assert len(outcome_line(Outcome(device="box1", report=device.reported)).splitlines()) <= 2


def test_answers_keep_their_lines_and_nothing_that_acts() -> None:
    assert prose("a\n\tb\x1b[2J \u200d\U0001f525") == "a\n\tb\N{REPLACEMENT CHARACTER}[2J \u200d\U0001f525"
    assert plain("a\nb", 3) == "a\N{REPLACEMENT CHARACTER}b"
    assert plain("abcd", 3) == "ab\N{HORIZONTAL ELLIPSIS}"


def test_json_means_the_same_and_holds_nothing_that_acts() -> None:
    text = safe_json(json.dumps({"a": ACTING + "\U000e0041"}, ensure_ascii=False))
    assert text.isprintable()
    assert json.loads(text) == {"a": ACTING + "\U000e0041"}


def test_an_error_of_a_device_is_one_line() -> None:
    reply = decode_reply(json.dumps({"type": "error", "id": None, "code": 400, "reason": ACTING, "message": ACTING,
                                     "param": ACTING, "hint": ACTING}).encode())  # fmt: skip
    assert isinstance(reply, ErrorReply)
    error = refusal(reply)
    assert isinstance(error, RequestError)
    assert all(line.strip().isprintable() for line in error.diagnostics().split("\n"))
    assert len(error.diagnostics().split("\n")) == 2


def test_the_figures_of_an_answer_are_one_line() -> None:
    final = {
        "type": "final", "id": "1", "seq": 0, "text": "", "finish_reason": "stop", "model": ACTING, "device": ACTING,
        "usage": {"prompt_tokens": 1, "cached_tokens": 0, "generated_tokens": 1},
        "timings": dict.fromkeys(
            ("queue_s", "prefill_s", "first_token_s", "decode_s", "prompt_tokens_per_s", "generated_tokens_per_s"),
            1e308,
        ),
    }  # fmt: skip
    reply = decode_reply(json.dumps(final).encode())
    assert isinstance(reply, FinalReply)
    assert summary(reply).isprintable()


def test_a_board_is_no_larger_than_the_terminal() -> None:
    board = Board(lambda: os.terminal_size((6, 4)))
    assert (
        board.draw([], ["a long line", "\u706f\u706f\u706f\u706f", "c", "d"]) == "a long\n\u706f\u706f\u706f\n... an\n"
    )
    assert board.draw([], ["a"]) == "\x1b[3A\x1b[Ja\n"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    with running_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.mark.broker
def test_the_table_of_many_devices_with_hostile_ones_among_them(
    broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    client = TestClient(broker.port)
    told = {"boot": 1, "connection": 1, "agent": "1", "state": "offline"}
    for number in range(200):
        client.publish(f"lamplighter/v1/device/box{number:03}/status", json.dumps(told), retain=True)
    client.publish("lamplighter/v1/device/evil/status", json.dumps({**told, "package": ACTING}), retain=True)
    client.publish("lamplighter/v1/device/noise/status", b"\xff\xfe", retain=True)
    flood = [("", "")] * 40_000  # paho would read them for seconds
    client.publish("lamplighter/v1/device/flood/status", json.dumps(told), retain=True, user_properties=flood)
    assert main(["devices", "--port", str(broker.port)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["DEVICE", *(f"box{number:03}" for number in range(200)), "evil"]
    assert all(line.isprintable() for line in lines)
    assert main(["devices", "--json", "--port", str(broker.port)]) == 0
    output = capsys.readouterr().out
    assert output.strip().isprintable()
    assert json.loads(output)[-1]["status"]["package"] == ACTING
    client.close()


@pytest.mark.broker
def test_a_broker_that_refuses_the_password_is_a_service_error(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    if mosquitto_path() is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("closed")
    (folder / "password").write_text("wrong\n")
    with running_broker(folder, "listener PORT 127.0.0.1\nallow_anonymous false\n") as closed:
        arguments = ["--port", str(closed.port), "--username", "fleet", "--password-file", str(folder / "password")]
        assert main(["devices", "--json", *arguments]) == 9
    out, err = capsys.readouterr()
    assert "Not authorized" in err
    assert json.loads(out)["error"]["hint"] == "check user name, password and ACL"
