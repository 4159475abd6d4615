"""paho's traps and a broker that comes and goes: each test is one way in which an agent could fall silent."""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamplighter_agent.config import AgentConfig, DeviceConfig, MqttConfig, RequestsConfig
from lamplighter_agent.service import mqtt_pacing, mqtt_service
from lamplighter_agent.service.mqtt_boxes import MAX_OUTBOX
from lamplighter_agent.service.mqtt_pacing import reconnect_delay_s
from lamplighter_agent.service.mqtt_types import Outgoing, Will
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import Broker, TestClient, free_port, mosquitto_path, running_broker
from support.service import MqttBox, running_box

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

DEVICE = "lamplighter/v1/device/box1"
REPLY = "lamplighter/v1/reply/tester/1"


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    with running_broker(tmp_path) as broker:
        yield broker


def config_for(port: int, box: str = "box1", groups: tuple[str, ...] = (), **mqtt: float) -> AgentConfig:
    settings = MqttConfig(port=port, **{"reconnect_max_s": 0.3, "delta_interval_s": 0.02, **mqtt})  # type: ignore[arg-type]
    return AgentConfig(
        device=DeviceConfig(id=box, groups=groups), mqtt=settings, requests=RequestsConfig(queue_size=64, burst=1000)
    )


def final_on(client: TestClient, topic: str = REPLY) -> dict[str, object]:
    while True:
        message: dict[str, object] = json.loads(client.next_on(topic).payload)
        if message["type"] != "delta":
            return message


def test_an_exception_while_connecting_does_not_end_the_network_thread(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        connection = box.service.connection
        original = connection._handlers
        calls: list[int] = []

        def fail_once(number: int) -> Will | None:
            calls.append(number)
            if len(calls) == 1:
                raise RuntimeError("a defect in a callback")
            return original.will(number)

        connection._handlers = original._replace(will=fail_once)
        own_broker.kill()
        own_broker.start()
        box.wait_until_connected()
        assert len(calls) >= 2
        assert connection.alive


def test_what_is_published_while_the_broker_is_away_is_bounded_and_counted(spec: WorkerSpec) -> None:
    with running_box(config_for(free_port()), spec) as box:
        connection = box.service.connection
        topic = "lamplighter/v1/device/box1/event"
        assert not connection.publish(Outgoing(topic=topic, payload=b"x", qos=0))
        taken = [connection.publish(Outgoing(topic=topic, payload=b"x", qos=1)) for _ in range(MAX_OUTBOX + 10)]
        assert taken.count(True) <= MAX_OUTBOX
        assert connection.dropped >= 11


def test_messages_from_many_threads_all_arrive(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        ear = TestClient(own_broker.port, "lamplighter/v1/device/box1/event")

        def publish(sender: int) -> None:
            for number in range(100):
                message = Outgoing(topic=f"{DEVICE}/event", payload=f"{sender}-{number}".encode(), qos=1)
                assert box.service.connection.publish(message)

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        received = {ear.next(20).payload for _ in range(400)}
        for thread in threads:
            thread.join(10)
        assert len(received) == 400
        ear.close()


def test_the_thread_stays_alive_while_the_event_loop_is_busy(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        released = threading.Event()
        box.thread.loop.call_soon_threadsafe(released.wait, 20)
        before = box.service.connection.last_tick_s
        app = TestClient(own_broker.port, REPLY)
        app.publish(f"{DEVICE}/prompt", "hi", response_topic=REPLY)
        ticks = threading.Event()
        for _ in range(200):
            if box.service.connection.last_tick_s > before:
                break
            ticks.wait(0.05)
        assert box.service.connection.last_tick_s > before
        released.set()
        assert final_on(app)["text"] == "You said: hi"
        app.close()


def test_the_delay_between_tries_grows_with_jitter_up_to_its_cap() -> None:
    first = {reconnect_delay_s(0, 60.0) for _ in range(50)}
    late = {reconnect_delay_s(20, 60.0) for _ in range(200)}
    assert len(first) == 50
    assert all(0.2 <= delay <= 1.0 for delay in first)
    assert max(late) > 30.0
    assert max(late) <= 60.0


def test_a_box_whose_session_is_taken_over_does_not_fight(spec: WorkerSpec, caplog: pytest.LogCaptureFixture) -> None:
    with fake_broker() as broker, running_box(config_for(broker.port, reconnect_max_s=600.0), spec):
        connection, _ = broker.accept_both()
        assert b'"online"' in read_until(connection, b'"online"')
        connection.sendall(b"\xe0\x02\x8e\x00")
        assert connection.recv(100) == b"" or read_until(connection, None)
        with pytest.raises(TimeoutError):
            broker.accept(timeout_s=1.5)
        assert "took over this device's session: is the device id used twice?" in caplog.text


def test_two_boxes_with_one_id_slow_down_and_say_so(
    own_broker: Broker, spec: WorkerSpec, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_pacing, "FIRST_DELAY_S", 0.02)
    with running_box(config_for(own_broker.port, reconnect_max_s=0.1), spec) as first:
        first.wait_until_connected()
        with running_box(config_for(own_broker.port, reconnect_max_s=0.1), spec) as second:
            for _ in range(6):
                second.wait_until_connected()
    assert "the broker ends connections soon after they begin: is the device id used twice?" in caplog.text


def test_a_prompt_sent_while_the_box_was_away_is_answered_when_it_comes_back(
    own_broker: Broker, spec: WorkerSpec
) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
    app = TestClient(own_broker.port, REPLY)
    app.publish(f"{DEVICE}/prompt", "later", response_topic=REPLY, expiry_s=600)
    with running_box(config_for(own_broker.port), spec):
        assert final_on(app)["text"] == "You said: later"
    app.close()


def test_a_group_shares_its_prompts_and_each_is_answered_once(own_broker: Broker, spec: WorkerSpec) -> None:
    with (
        running_box(config_for(own_broker.port, "box1", ("lobby",)), spec) as one,
        running_box(config_for(own_broker.port, "box2", ("lobby",)), spec) as two,
    ):
        one.wait_until_connected()
        two.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        for number in range(10):
            prompt = {"id": f"g{number}", "prompt": "hi", "stream": False}
            app.publish("lamplighter/v1/group/lobby/prompt", json.dumps(prompt), response_topic=REPLY)
        answers = [final_on(app) for _ in range(10)]
        with pytest.raises(queue.Empty):
            app.next(0.2)
        app.close()
    assert sorted(str(answer["id"]) for answer in answers) == sorted(f"g{number}" for number in range(10))
    assert {answer["device"] for answer in answers} == {"box1", "box2"}


def test_an_answer_that_was_lost_with_the_broker_is_sent_again_when_asked_for(
    own_broker: Broker, spec: WorkerSpec
) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        prompt = json.dumps({"id": "a", "prompt": "hi", "reply_to": REPLY, "stream": False})
        app = TestClient(own_broker.port, REPLY)
        app.publish(f"{DEVICE}/prompt", prompt)
        first = final_on(app)
        app.publish(f"{DEVICE}/prompt", prompt)  # on the same connection: it has arrived
        with pytest.raises(queue.Empty):
            app.next(0.2)
        app.close()
        own_broker.kill()
        own_broker.start()
        box.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        app.publish(f"{DEVICE}/prompt", prompt)
        assert final_on(app) == first
        assert box.requests.counters.accepted == 1
        app.close()


def test_prompts_repeated_delayed_and_reordered_are_each_answered_once(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        wanted = {f"p{number}": f"You said: say {number}" for number in range(8)}
        prompts = [
            json.dumps({"id": name, "prompt": text.removeprefix("You said: "), "reply_to": REPLY, "stream": False})
            for name, text in wanted.items()
        ]
        for prompt in [*prompts, *reversed(prompts), *prompts[::2], *prompts[1::2]]:
            app.publish(f"{DEVICE}/prompt", prompt)
        answers = [final_on(app) for _ in prompts]
        with pytest.raises(queue.Empty):
            app.next(0.2)
        app.close()
        assert {answer["id"]: answer["text"] for answer in answers} == wanted


def test_a_prompt_without_id_that_the_broker_delivers_twice_is_answered_once(spec: WorkerSpec) -> None:
    with fake_broker() as broker, running_box(config_for(broker.port, keepalive_s=5), spec):
        answers, prompts = broker.accept_both()
        publish_qos1(prompts, f"{DEVICE}/prompt", b"once", packet_id=7, dup=False)
        assert b'"final"' in read_until(answers, b'"final"')
        publish_qos1(prompts, f"{DEVICE}/prompt", b"once", packet_id=7, dup=True)
        publish_qos1(prompts, f"{DEVICE}/prompt", b"marker", packet_id=8, dup=False)
        text = read_until(answers, b"You said: marker")
        assert b"You said: once" not in text


def test_the_brokers_receive_maximum_is_kept(spec: WorkerSpec) -> None:
    with fake_broker(receive_maximum=2) as broker, running_box(config_for(broker.port, keepalive_s=5), spec) as box:
        connection, _ = broker.accept_both()
        for number in range(6):
            box.service.publish_event("tested", f"n{number}")
        seen = read_until(connection, None)
        assert seen.count(b'"tested"') + seen.count(b'"online"') == 2  # nothing was acknowledged


class FakeBroker:
    """A server that speaks as much MQTT 5 as a test needs, so that the wire can be wrong on purpose."""

    def __init__(self, receive_maximum: int | None) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._properties = b"" if receive_maximum is None else b"\x21" + struct.pack(">H", receive_maximum)
        self.port: int = self._server.getsockname()[1]

    def accept(self, timeout_s: float = 20.0) -> socket.socket:
        """Accept a connection of the agent: CONNACK and SUBACK."""
        self._server.settimeout(timeout_s)
        connection, _ = self._server.accept()
        self._connections.append(connection)
        connection.settimeout(1.5)
        connection.recv(4096)
        body = b"\x00\x00" + bytes([len(self._properties)]) + self._properties
        connection.sendall(b"\x20" + bytes([len(body)]) + body)
        subscribe = connection.recv(4096)
        assert subscribe[0] == 0x82
        identifier = subscribe[2:4] if subscribe[1] < 128 else subscribe[3:5]
        body = identifier + b"\x00" + b"\x01" * 3
        connection.sendall(b"\x90" + bytes([len(body)]) + body)
        return connection

    def accept_both(self) -> tuple[socket.socket, socket.socket]:
        """Accept the agent's connection for commands, and then that for prompts."""
        return self.accept(), self.accept()

    def close(self) -> None:
        """Close everything."""
        for each in (self._server, *self._connections):
            each.close()


@contextmanager
def fake_broker(receive_maximum: int | None = None) -> Iterator[FakeBroker]:
    """A fake broker that is closed at the end."""
    broker = FakeBroker(receive_maximum)
    try:
        yield broker
    finally:
        broker.close()


def publish_qos1(connection: socket.socket, topic: str, payload: bytes, *, packet_id: int, dup: bool) -> None:
    body = struct.pack(">H", len(topic)) + topic.encode() + struct.pack(">H", packet_id) + b"\x00" + payload
    assert len(body) < 128
    connection.sendall(bytes([0x3A if dup else 0x32, len(body)]) + body)


def flood(connection: socket.socket, count: int) -> None:
    """Send prompts until the agent reads no more, or the connection ends."""
    try:
        for number in range(1, count + 1):
            publish_qos1(connection, f"{DEVICE}/prompt", b"flood", packet_id=number, dup=False)
    except OSError:
        return


def acknowledge_all(connection: socket.socket) -> None:
    """Acknowledge the messages of the window: paho numbers them from 1."""
    for number in range(1, 65):
        connection.sendall(b"\x40\x02" + struct.pack(">H", number))


def read_until(connection: socket.socket, wanted: bytes | None) -> bytes:
    """Read what the agent sends until it says something, or until it says nothing more for a while."""
    text = b""
    while wanted is None or wanted not in text:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            break
        if not data:
            break
        text += data
    return text


def test_a_box_stops_in_time_when_the_broker_does_not_answer_any_more(spec: WorkerSpec) -> None:
    with fake_broker() as broker:
        box = MqttBox(config_for(broker.port, keepalive_s=5), spec)
        broker.accept()
        box.service.publish_event("never", "acknowledged")
        box.close()
        assert not box.service.connection.alive


def test_prompts_are_not_read_while_their_answers_cannot_leave_and_commands_are_answered(spec: WorkerSpec) -> None:
    with fake_broker() as broker, running_box(config_for(broker.port, keepalive_s=5), spec) as box:
        control, prompts = broker.accept_both()
        sender = threading.Thread(target=flood, args=(prompts, 20_000), daemon=True)
        sender.start()
        received = read_until(prompts, None)  # the broker acknowledges no answer
        acknowledged = sum(b"\x40\x02" + struct.pack(">H", number) in received for number in range(1, 3000))
        assert MAX_OUTBOX // 4 < acknowledged < MAX_OUTBOX
        assert box.service.dropped == 0
        publish_qos1(control, f"{DEVICE}/desired", b"{", packet_id=1, dup=False)  # what follows is read too
        publish_qos1(control, f"{DEVICE}/cancel", b"none", packet_id=2, dup=False)
        publish_qos1(control, f"{DEVICE}/command", b'{"command":"ping"}', packet_id=3, dup=False)
        pause = threading.Event()
        while not box.service.connection._outbox._urgent:
            pause.wait(0.01)
        acknowledge_all(control)  # the window was full: what is urgent leaves first
        assert b"ping done" in read_until(control, b"ping done")
    sender.join(10)


def test_a_box_that_cannot_take_prompts_says_so_and_takes_commands(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_service, "_PROMPTS_GRACE_S", 0.1)
    with fake_broker() as broker, running_box(config_for(broker.port, keepalive_s=5), spec):
        control = broker.accept()
        assert b'"reason":"no_prompts"' in read_until(control, b'"no_prompts"')
        publish_qos1(control, f"{DEVICE}/command", b'{"command":"ping"}', packet_id=1, dup=False)
        assert b"ping done" in read_until(control, b"ping done")
        broker.accept()
        assert b'"reason":null' in read_until(control, b'"reason":null')


def test_a_group_that_a_box_has_left_asks_another_box(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port, groups=("lobby",)), spec) as box:
        box.wait_until_connected()
    app = TestClient(own_broker.port, REPLY)
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        app.publish("lamplighter/v1/group/lobby/prompt", "hi", response_topic=REPLY)
        refusal = json.loads(app.next_on(REPLY).payload)
        assert (refusal["code"], refusal["message"]) == (503, "box1 is in the group 'lobby' no more")
        app.publish(f"{DEVICE}/prompt", "a round trip later", response_topic=REPLY)
        final_on(app)
        app.publish("lamplighter/v1/group/lobby/prompt", "hi", response_topic=REPLY)
        with pytest.raises(queue.Empty):
            app.next(0.3)  # nobody has subscribed any more
    app.close()


def test_a_command_that_fails_for_a_defect_ends_alone(own_broker: Broker, spec: WorkerSpec) -> None:
    with running_box(config_for(own_broker.port), spec) as box:
        box.wait_until_connected()
        app = TestClient(own_broker.port, REPLY)
        for command in ("cancel_update", "ping"):
            app.publish(f"{DEVICE}/command", json.dumps({"command": command, "reply_to": REPLY}))
        failure, result = (json.loads(app.next_on(REPLY).payload) for _ in range(2))
        assert (failure["code"], failure["message"]) == (500, "the command failed in the agent: ValueError")
        assert result["message"] == "ping done"
        app.close()
