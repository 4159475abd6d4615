"""A real mosquitto on a free loopback port, with the shipped configuration, and a client to watch it with."""

from __future__ import annotations

import queue
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

CONFIG = Path(__file__).parents[2] / "configs" / "mosquitto" / "lamplighter.conf"
_START_TIMEOUT_S = 10.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mosquitto_path() -> str | None:
    """Where the broker is, or None; Debian puts it outside an ordinary user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


class Broker:
    """One broker process that can be killed and started again on the same port.

    Args:
        folder: Its working directory, where its database lies.
        config: Its configuration; one without a listener gets the port on the command line.
    """

    def __init__(self, folder: Path, config: Path = CONFIG) -> None:
        self.port = free_port()
        self._folder = folder
        self._config = config
        self._arguments = ["-p", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        path = mosquitto_path()
        assert path is not None, "mosquitto is not installed"
        with (self._folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [path, "-c", str(self._config), *self._arguments],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        end = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                probe = socket.create_connection(("127.0.0.1", self.port), timeout=1)
            except OSError:
                assert self._process.poll() is None, (self._folder / "mosquitto.log").read_text()
                assert time.monotonic() < end, "mosquitto does not listen"
                time.sleep(0.01)  # there is nothing to wait on: a port cannot be watched
            else:
                probe.close()
                return

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def stop(self) -> None:
        """End it in order; its database is written."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def use_config(self, text: str) -> None:
        """Take another configuration, in which ``PORT`` stands for the port."""
        self._config = self._folder / "mosquitto.conf"
        self._config.write_text(text.replace("PORT", str(self.port)))
        self._arguments = []


@contextmanager
def running_broker(folder: Path, config: str | None = None) -> Iterator[Broker]:
    """A broker that is stopped at the end; ``config`` is used in place of the shipped one."""
    broker = Broker(folder)
    if config is not None:
        broker.use_config(config)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


class Received:
    """A message that a test client got."""

    def __init__(self, message: paho.MQTTMessage) -> None:
        self.topic = message.topic
        self.payload = bytes(message.payload)
        self.retain = message.retain
        self.qos = message.qos
        properties: dict[str, Any] = message.properties.json() if message.properties else {}  # type: ignore[no-untyped-call]
        self.correlation: str | None = properties.get("CorrelationData")


class TestClient:
    """A plain client that subscribes, publishes and waits for messages.

    Args:
        port: The broker's.
        topics: Filters to subscribe to before the constructor returns.
        v5: MQTT 5, or 3.1.1.
        username: User name, or None.
        tls: Context for TLS, or None.
    """

    __test__ = False

    def __init__(
        self,
        port: int,
        *topics: str,
        v5: bool = True,
        username: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.inbox: queue.Queue[Received] = queue.Queue()
        self._v5 = v5
        protocol = MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        if username is not None:
            self._client.username_pw_set(username)
        if tls is not None:
            self._client.tls_set_context(tls)
        subscribed: queue.Queue[None] = queue.Queue()
        self._client.on_message = lambda _client, _data, message: self.inbox.put(Received(message))
        self._client.on_subscribe = lambda *_arguments: subscribed.put(None)
        self._client.on_connect = lambda *_arguments: subscribed.put(None)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        subscribed.get(timeout=10)
        if topics:
            self._client.subscribe([(topic, 1) for topic in topics])
            subscribed.get(timeout=10)

    def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        qos: int = 1,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        user_properties: list[tuple[str, str]] | None = None,
    ) -> None:
        properties = None
        if self._v5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            if response_topic is not None:
                properties.ResponseTopic = response_topic
            if correlation is not None:
                properties.CorrelationData = correlation
            if expiry_s is not None:
                properties.MessageExpiryInterval = expiry_s
            if user_properties is not None:
                properties.UserProperty = user_properties
        self._client.publish(topic, payload, qos, retain, properties).wait_for_publish(10)

    def next(self, timeout_s: float = 10.0) -> Received:
        """The next message; ``queue.Empty`` when none comes."""
        return self.inbox.get(timeout=timeout_s)

    def next_on(self, topic: str, timeout_s: float = 10.0) -> Received:
        """The next message on ``topic``, passing over others."""
        end = time.monotonic() + timeout_s
        while True:
            message = self.inbox.get(timeout=max(end - time.monotonic(), 0.001))
            if message.topic == topic:
                return message

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self._client.on_connect = self._client.on_message = self._client.on_subscribe = None  # no cycle keeps its pipe
