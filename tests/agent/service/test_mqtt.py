"""A box on a real broker: prompts, answers, cancel, commands, status, and what goes wrong."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from lamplighter_agent.config import AgentConfig, DeviceConfig, MqttConfig, RequestsConfig
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import Broker, TestClient, mosquitto_path, running_broker
from support.service import MqttBox, running_box

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

DEVICE = "lamplighter/v1/device/box1"
REPLY = "lamplighter/v1/reply/app1/answers"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker that a test may kill."""
    with running_broker(tmp_path) as running:
        yield running


def config_for(broker: Broker, protocol: Literal["5", "3.1.1"] = "5") -> AgentConfig:
    return AgentConfig(
        device=DeviceConfig(id="box1", groups=("lobby",)),
        mqtt=MqttConfig(port=broker.port, delta_interval_s=0.05, reconnect_max_s=0.5, protocol=protocol),
        requests=RequestsConfig(queue_size=2, default_deadline_s=30.0),
    )


@pytest.fixture
def box(broker: Broker, spec: WorkerSpec) -> Iterator[MqttBox]:
    with running_box(config_for(broker), spec) as running:
        running.wait_until_connected()
        yield running


@pytest.fixture
def client(broker: Broker) -> Iterator[Callable[..., TestClient]]:
    clients: list[TestClient] = []

    def connect(*topics: str, v5: bool = True) -> TestClient:
        clients.append(TestClient(broker.port, *topics, v5=v5))
        return clients[-1]

    yield connect
    for each in clients:
        each.close()


def read_answer(app: TestClient, topic: str = REPLY) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the deltas in order of arrival, and the final or error message."""
    deltas: list[dict[str, Any]] = []
    while True:
        message = json.loads(app.next_on(topic).payload)
        if message["type"] != "delta":
            return deltas, message
        deltas.append(message)


def test_plain_text_is_answered_on_the_devices_own_reply_topic(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(f"{DEVICE}/reply")
    app.publish(f"{DEVICE}/prompt", "Why is the sky blue?")
    deltas, final = read_answer(app, f"{DEVICE}/reply")
    assert final["type"] == "final"
    assert final["text"] == "You said: Why is the sky blue?"
    assert "".join(delta["text"] for delta in deltas) == final["text"]
    assert [delta["seq"] for delta in deltas] == list(range(final["seq"]))
    assert final["finish_reason"] == "stop"
    assert final["model"] == "fake/1"
    assert final["usage"]["generated_tokens"] == len(final["text"])


def test_json_with_response_topic_and_correlation_data(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish(
        f"{DEVICE}/prompt",
        json.dumps({"messages": [{"role": "user", "content": "hi"}], "reply_to": f"{DEVICE}/reply", "max_tokens": 5}),
        response_topic=REPLY,
        correlation=b"\x01\xfe",
    )
    received = app.next_on(REPLY)
    assert received.correlation == "01fe"
    _, final = read_answer(app)
    assert (final["text"], final["finish_reason"], final["id"]) == ("You s", "length", "01fe")


def test_mqtt_311_uses_the_json_fields(broker: Broker, spec: WorkerSpec, client: Callable[..., TestClient]) -> None:
    with running_box(config_for(broker, protocol="3.1.1"), spec) as running:
        running.wait_until_connected()
        app = client(REPLY, v5=False)
        prompt = {"id": "q1", "prompt": "hi", "reply_to": REPLY, "correlation": "mine", "stream": False}
        app.publish(f"{DEVICE}/prompt", json.dumps(prompt))
        deltas, final = read_answer(app)
    assert deltas == []
    assert (final["id"], final["correlation"], final["text"]) == ("q1", "mine", "You said: hi")


def test_a_group_prompt_is_answered(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish("lamplighter/v1/group/lobby/prompt", "anyone?", response_topic=REPLY)
    assert read_answer(app)[1]["device"] == "box1"


def test_the_same_id_is_answered_once(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    prompt = json.dumps({"id": "once", "prompt": "hi", "reply_to": REPLY, "stream": False})
    app.publish(f"{DEVICE}/prompt", prompt)
    app.publish(f"{DEVICE}/prompt", prompt)
    app.publish(f"{DEVICE}/prompt", json.dumps({"id": "other", "prompt": "ho", "reply_to": REPLY, "stream": False}))
    answers = [read_answer(app)[1]["id"] for _ in range(2)]
    assert sorted(answers) == ["once", "other"]
    with pytest.raises(queue.Empty):
        app.next(0.3)


def test_a_known_id_with_another_prompt_is_refused(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    for text in ("one", "two"):
        app.publish(f"{DEVICE}/prompt", json.dumps({"id": "x", "prompt": text, "reply_to": REPLY, "stream": False}))
    answers = {read_answer(app)[1]["type"]: None for _ in range(2)}
    assert set(answers) == {"final", "error"}


def test_cancel_ends_the_answer_with_what_there_was(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish(f"{DEVICE}/prompt", json.dumps({"id": "long", "prompt": "/slow", "reply_to": REPLY}))
    app.next_on(REPLY)
    app.publish(f"{DEVICE}/cancel", "long", qos=0)
    final = read_answer(app)[1]
    assert final["finish_reason"] == "cancelled"
    assert ("slow " * 4096).startswith(final["text"])
    assert final["text"]


def test_the_deadline_ends_the_answer(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish(f"{DEVICE}/prompt", json.dumps({"prompt": "/slow", "deadline_s": 0.3, "reply_to": REPLY}))
    assert read_answer(app)[1]["finish_reason"] == "deadline"


def test_too_many_prompts_are_refused_with_429(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    for number in range(5):  # two slots, a queue of two
        prompt = {"id": f"n{number}", "prompt": "/slow", "reply_to": REPLY, "stream": False}
        app.publish(f"{DEVICE}/prompt", json.dumps(prompt))
    error = read_answer(app)[1]
    assert (error["type"], error["id"], error["code"]) == ("error", "n4", 429)
    assert error["retry_after_s"] > 0
    for number in (3, 2, 1, 0):  # those that wait first, or they would take the place of the others
        app.publish(f"{DEVICE}/cancel", f"n{number}")
    codes = sorted(answer.get("code", 200) for answer in (read_answer(app)[1] for _ in range(4)))
    assert codes == [200, 200, 499, 499]


def test_in_a_flood_every_prompt_is_answered_or_refused_and_commands_get_through(
    box: MqttBox, client: Callable[..., TestClient]
) -> None:
    operator_reply = "lamplighter/v1/reply/fleet/flood"
    app, operator = client(REPLY), client(operator_reply)
    ids = [f"f{number}" for number in range(150)]
    for number, request_id in enumerate(ids):
        prompt = {"id": request_id, "prompt": "flood", "reply_to": REPLY, "stream": False}
        app.publish(f"{DEVICE}/prompt", json.dumps(prompt))
        if number % 50 == 0:
            command = {"id": f"c{number}", "command": "ping", "reply_to": operator_reply}
            operator.publish(f"{DEVICE}/command", json.dumps(command))
    ended = [read_answer(app)[1] for _ in ids]
    assert sorted(answer["id"] for answer in ended) == sorted(ids)
    assert {answer.get("code", 200) for answer in ended} == {200, 429}
    done = [read_answer(operator, operator_reply)[1] for _ in range(3)]
    assert [(answer["type"], answer["id"]) for answer in done] == [
        ("result", f"c{number}") for number in range(0, 150, 50)
    ]


@pytest.mark.parametrize(
    "reply_to",
    ["lamplighter/v1/device/box2/command", "lamplighter/v1/reply/", "lamplighter/v1/reply/+/x", "elsewhere"],
)
def test_a_reply_topic_outside_the_reply_area_is_refused(
    box: MqttBox, client: Callable[..., TestClient], reply_to: str
) -> None:
    app = client(f"{DEVICE}/reply", "lamplighter/v1/device/box2/command", "elsewhere")
    app.publish(f"{DEVICE}/prompt", json.dumps({"id": "q", "prompt": "hi", "reply_to": reply_to}))
    received = app.next()
    assert received.topic == f"{DEVICE}/reply"
    error = json.loads(received.payload)
    assert (error["code"], error["param"], error["id"]) == (400, "reply_to", "q")


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\xff\xfe\x00", 400),
        (b'{"prompt": ', 400),
        (b'{"prompt": 1}', 400),
        (b'{"prompt": "hi", "tempature": 1}', 400),
        (b'{"prompt": "hi", "temperature": -1}', 400),
        (b"[" * 50_000, 200),  # not an object: words of the user, however odd
        (b'{"a":' * 12_000, 400),
        (b"x" * 70_000, 413),
        (b"", 400),
    ],
    ids=["bytes", "cut", "type", "unknown field", "range", "brackets", "deep", "large", "empty"],
)
def test_hostile_payloads_are_answered_and_harm_nothing(
    box: MqttBox, client: Callable[..., TestClient], payload: bytes, code: int
) -> None:
    app = client(REPLY)
    app.publish(f"{DEVICE}/prompt", payload, response_topic=REPLY)
    answer = read_answer(app)[1]
    # Fifty thousand brackets are refused by the engine: they do not fit into its context.
    assert answer["code"] == (400 if code == 200 else code)
    app.publish(f"{DEVICE}/prompt", "still there?", response_topic=REPLY)
    assert read_answer(app)[1]["text"] == "You said: still there?"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_retained_prompt_is_ignored(own_broker: Broker, spec: WorkerSpec, protocol: Literal["5", "3.1.1"]) -> None:
    app = TestClient(own_broker.port, f"{DEVICE}/reply")
    app.publish(f"{DEVICE}/prompt", "again and again", retain=True)
    with running_box(config_for(own_broker, protocol), spec) as running:
        running.wait_until_connected()
        app.publish(f"{DEVICE}/prompt", "once")
        assert read_answer(app, f"{DEVICE}/reply")[1]["text"] == "You said: once"
        app.close()


def test_commands_are_answered(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish(f"{DEVICE}/command", json.dumps({"id": "c1", "command": "ping", "reply_to": REPLY}))
    assert json.loads(app.next_on(REPLY).payload) == {
        "type": "result",
        "id": "c1",
        "message": "ping done",
        "data": None,
        "correlation": None,
    }
    app.publish(f"{DEVICE}/command", json.dumps({"id": "c2", "command": "rollback", "reply_to": REPLY}))
    assert json.loads(app.next_on(REPLY).payload)["code"] == 404
    app.publish(f"{DEVICE}/command", json.dumps({"id": "c3", "command": "rm -rf /", "reply_to": REPLY}))
    assert json.loads(app.next_on(REPLY).payload)["code"] == 400
    assert [command.id for command in box.commands] == ["c1", "c2"]


def test_desired_is_handed_on_and_damage_is_reported(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(f"{DEVICE}/#")
    app.publish(f"{DEVICE}/desired", json.dumps({"package": "../etc", "version": "1", "id": "a"}))
    assert json.loads(app.next_on(f"{DEVICE}/event").payload)["name"] == "desired_invalid"
    app.publish(f"{DEVICE}/desired", json.dumps({"package": "smollm2", "version": "1.0", "id": "b"}))
    app.publish(f"{DEVICE}/desired", b"")
    app.publish(f"{DEVICE}/command", json.dumps({"command": "ping"}))
    app.next_on(f"{DEVICE}/reply")
    assert [str(desired.reference) for desired in box.desired] == ["smollm2/1.0"]


def test_status_is_retained_and_says_goodbye(
    broker: Broker, spec: WorkerSpec, client: Callable[..., TestClient]
) -> None:
    with running_box(config_for(broker), spec, boot=7) as running:
        running.wait_until_connected()
        watcher = client(f"{DEVICE}/status")
        online = watcher.next()
        assert online.retain
        status = json.loads(online.payload)
        assert (status["state"], status["boot"], status["package"]) == ("online", 7, "fake/1")
    offline = json.loads(watcher.next().payload)
    assert (offline["state"], offline["boot"], offline["reason"]) == ("offline", 7, "shutdown")


def test_a_late_will_does_not_win(box: MqttBox, client: Callable[..., TestClient]) -> None:
    watcher = client(f"{DEVICE}/status")
    assert json.loads(watcher.next().payload)["state"] == "online"
    watcher.publish(
        f"{DEVICE}/status", json.dumps({"state": "offline", "boot": 0, "connection": 9, "agent": "0"}), retain=True
    )
    assert json.loads(watcher.next().payload)["state"] == "offline"
    assert json.loads(watcher.next().payload)["state"] == "online"


def test_a_broker_that_comes_late_and_goes_again(own_broker: Broker, spec: WorkerSpec) -> None:
    own_broker.kill()
    with running_box(config_for(own_broker), spec) as running:
        own_broker.start()
        running.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        app.publish(f"{DEVICE}/prompt", json.dumps({"prompt": "/count 300", "reply_to": REPLY}))
        app.next_on(REPLY)
        app.close()
        own_broker.kill()
        own_broker.start()
        running.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        app.publish(f"{DEVICE}/prompt", json.dumps({"id": "2", "prompt": "hi", "reply_to": REPLY}))
        while (final := read_answer(app)[1])["id"] != "2":
            assert final["finish_reason"] == "stop"
        assert final["text"] == "You said: hi"
        app.close()


def test_a_lost_worker_is_a_503_worth_a_retry(box: MqttBox, client: Callable[..., TestClient]) -> None:
    app = client(REPLY)
    app.publish(f"{DEVICE}/prompt", json.dumps({"prompt": "/crash", "reply_to": REPLY}))
    error = read_answer(app)[1]
    assert (error["code"], error["reason"]) == (503, "worker_lost")
    assert error["retry_after_s"] > 0


def test_a_wrong_server_does_not_end_the_network_thread(tmp_path: Path, spec: WorkerSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        config = AgentConfig(
            device=DeviceConfig(id="box1"), mqtt=MqttConfig(port=server.getsockname()[1], reconnect_max_s=0.3)
        )
        with running_box(config, spec) as running:
            for _ in range(2):
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()
            assert running.service.connection.alive
