"""Prompts whose sender means ill: what they repeat, what they cost to read, and where their refusals go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from lamplighter_agent.config import AgentConfig, DeviceConfig, MqttConfig
from lamplighter_agent.service.message_codec import MAX_MESSAGE_BYTES
from lamplighter_agent.service.mqtt_bounds import MAX_PROPERTIES_BYTES, without_flood
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import Broker, TestClient, mosquitto_path, running_broker
from support.service import MqttBox, running_box

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

PROMPT = "lamplighter/v1/device/box1/prompt"
REPLY = "lamplighter/v1/reply/app1/answers"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def box(broker: Broker, spec: WorkerSpec) -> Iterator[MqttBox]:
    config = AgentConfig(device=DeviceConfig(id="box1"), mqtt=MqttConfig(port=broker.port))
    with running_box(config, spec) as running:
        running.wait_until_connected()
        yield running


@pytest.fixture
def app(broker: Broker) -> Iterator[TestClient]:
    client = TestClient(broker.port, REPLY, "lamplighter/v1/device/box1/reply")
    yield client
    client.close()


def end_of(app: TestClient) -> tuple[dict[str, Any], str | None, int]:
    """Return the next final or error message, its correlation data and its size."""
    while True:
        received = app.next()
        message = json.loads(received.payload)
        if message["type"] != "delta":
            return message, received.correlation, len(received.payload)


def test_a_flood_of_user_properties_is_refused_unread(box: MqttBox, app: TestClient) -> None:
    # Reading them all would take paho some seconds.
    flood = [("", "")] * 40_000
    app.publish(PROMPT, json.dumps({"prompt": "hi", "reply_to": REPLY}), user_properties=flood, response_topic=REPLY)
    error, _, _ = end_of(app)
    assert (error["code"], error["message"]) == (413, "the message's properties are too long to be read")
    app.publish(PROMPT, "still there?", response_topic=REPLY, user_properties=[("traceparent", "00-1-2-01")])
    assert end_of(app)[0]["text"] == "You said: still there?"


@pytest.mark.parametrize("has_number", [True, False])
@pytest.mark.parametrize(("length", "kept"), [(MAX_PROPERTIES_BYTES, True), (MAX_PROPERTIES_BYTES + 1, False)])
def test_properties_are_cut_out_where_they_are_too_long(has_number: bool, length: int, kept: bool) -> None:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = ("k", "v" * (length - 6))
    packed = properties.pack()  # type: ignore[no-untyped-call]
    head = b"\x00\x03a/b" + (b"\x00\x07" if has_number else b"")
    packet = head + packed + b"payload"
    assert without_flood(packet, has_number=has_number) == (packet if kept else head + b"\x00payload")


@pytest.mark.parametrize("packet", [b"", b"\x00", b"\xff\xff", b"\x00\x01a", b"\x00\x01a\xff\xff\xff\xff\xff"])
def test_a_packet_that_is_cut_off_is_left_to_the_decoder(packet: bytes) -> None:
    assert len(without_flood(packet, has_number=False)) <= len(packet) + 1


def test_correlation_data_that_every_answer_would_repeat_are_refused(box: MqttBox, app: TestClient) -> None:
    app.publish(PROMPT, "hi", response_topic=REPLY, correlation=b"c" * 257)
    error, correlation, _ = end_of(app)
    assert (error["code"], error["param"], correlation) == (400, "correlation", None)
    app.publish(PROMPT, "hi", response_topic=REPLY, correlation=b"c" * 256)
    answer, correlation, _ = end_of(app)
    assert (answer["text"], correlation) == ("You said: hi", (b"c" * 256).hex())


def test_prompts_whose_correlation_data_begin_alike_are_two_requests(box: MqttBox, app: TestClient) -> None:
    for last in b"12":
        app.publish(PROMPT, f"{last}", response_topic=REPLY, correlation=b"c" * 64 + bytes([last]))
        assert end_of(app)[0]["text"] == f"You said: {last}"


@pytest.mark.parametrize(
    "fields",
    [{"x" * 60_000: 1}, {"id": "i" * 60_000}, {"correlation": "c" * 60_000}, {"model": "m" * 60_000}],
    ids=lambda fields: next(iter(fields))[:12],
)
def test_a_refusal_repeats_little_of_what_was_sent(box: MqttBox, app: TestClient, fields: dict[str, object]) -> None:
    app.publish(PROMPT, json.dumps({"prompt": "hi", **fields}), response_topic=REPLY)
    error, _, size = end_of(app)
    assert error["code"] == 400
    assert size < 1000 < MAX_MESSAGE_BYTES


def test_what_a_refusal_says_and_the_log_repeats_has_no_control_characters(
    box: MqttBox, app: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lamplighter_agent")
    app.publish(PROMPT, json.dumps({"prompt": "hi", "\x1b[2J\nCRITICAL broken": 1}), response_topic=REPLY)
    error, _, _ = end_of(app)
    assert error["message"] == r"prompt: the field '\x1b[2J\nCRITICAL broken' is not known"
    assert error["message"].isprintable()
    assert "\x1b" not in caplog.text
    assert "\nCRITICAL" not in caplog.text


def test_a_prompt_retained_while_the_box_is_there_is_ignored(box: MqttBox, app: TestClient) -> None:
    app.publish(PROMPT, "again and again", retain=True)
    app.publish(PROMPT, "", retain=True)
    app.publish(PROMPT, "once", response_topic=REPLY)
    assert end_of(app)[0]["text"] == "You said: once"


@pytest.mark.parametrize("qos", [0, 2])
def test_prompts_of_other_qualities_of_service_are_answered_once(box: MqttBox, app: TestClient, qos: int) -> None:
    app.publish(PROMPT, f"with {qos}", qos=qos, response_topic=REPLY)
    app.publish(PROMPT, "and on", response_topic=REPLY)
    assert [end_of(app)[0]["text"] for _ in range(2)] == [f"You said: with {qos}", "You said: and on"]
