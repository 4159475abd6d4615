"""A tool's connection to the broker: publish, subscribe, and read messages with a bound on waiting."""

from __future__ import annotations

import queue
import ssl
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from lamplighter_agent.errors import ConfigError, ServiceError
from lamplighter_agent.service.messages import Topics
from lamplighter_agent.service.mqtt_bounds import MAX_PACKET_BYTES, BoundedClient

MAX_INBOX: Final = 20_000
_AT_ONCE: Final = 500
_KEEPALIVE_S: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerOptions:
    """Where the broker is and who asks.

    Attributes:
        host: Its name or address.
        port: Its port.
        prefix: First levels of every topic.
        username: User name, or None.
        password: Password, or None.
        ca_file: Authority that signed the broker's certificate; switches TLS on.
        cert_file: Certificate of this tool, or None.
        key_file: Its key, or None.
        timeout_s: Bound on connecting, subscribing and each acknowledgement.
    """

    host: str = "127.0.0.1"
    port: int = 1883
    prefix: str = "lamplighter/v1"
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the broker."""

    topic: str
    payload: bytes
    retain: bool


class Broker:
    """A connection; use `connect`.

    Attributes:
        prefix: First levels of every topic.
        reply_topic: A topic of this connection's own, below ``reply/``.
    """

    def __init__(self, options: BrokerOptions) -> None:
        self.prefix = options.prefix
        name = options.username or f"fleet-{uuid.uuid4().hex[:8]}"
        self.reply_topic = f"{options.prefix}/reply/{name}/{uuid.uuid4().hex}"
        self._options = options
        self._inbox: queue.Queue[Message] = queue.Queue(MAX_INBOX)
        self._filters: list[tuple[str, int]] = []
        self._connected = threading.Event()
        self._subscribed = threading.Semaphore(0)
        self._refusal: str | None = None
        self._client = self._make_client()

    def topics(self, device_id: str) -> Topics:
        """Return the topics of a device.

        Raises:
            RequestError: If the id cannot be a topic level.
        """
        return Topics(self.prefix, device_id)

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Subscribe; retained messages arrive first.

        Raises:
            ServiceError: If the broker refuses or does not answer.
        """
        wanted = [(topic, qos) for topic in filters]
        self._filters += wanted
        self._client.subscribe(list(wanted))
        if not self._subscribed.acquire(timeout=self._options.timeout_s):
            raise ServiceError(f"the broker did not answer the subscription to {', '.join(filters)}")
        self._check()

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: int | None = None
    ) -> None:
        """Publish, and wait for the acknowledgement when there is one.

        Raises:
            ServiceError: If the broker does not acknowledge it.
        """
        self._wait_for(topic, self._send(topic, payload, qos, retain=retain, expiry_s=expiry_s))

    def publish_to_all(self, topics: Sequence[str], payload: bytes, *, retain: bool = False) -> None:
        """Publish the same on many topics with QoS 1, many at once: a round trip for each would take minutes.

        Raises:
            ServiceError: If the broker does not acknowledge one of them.
        """
        for begin in range(0, len(topics), _AT_ONCE):
            some = topics[begin : begin + _AT_ONCE]
            sent = [self._send(topic, payload, 1, retain=retain, expiry_s=None) for topic in some]
            for topic, each in zip(some, sent, strict=True):
                self._wait_for(topic, each)

    def _send(
        self, topic: str, payload: bytes, qos: int, *, retain: bool, expiry_s: int | None
    ) -> paho.MQTTMessageInfo:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = "application/json"
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        return self._client.publish(topic, payload, qos, retain, properties)

    def _wait_for(self, topic: str, sent: paho.MQTTMessageInfo) -> None:
        try:
            sent.wait_for_publish(self._options.timeout_s)
        except (RuntimeError, ValueError) as error:
            raise ServiceError(f"cannot publish on {topic}: {error}") from error
        if not sent.is_published():
            raise ServiceError(f"the broker did not acknowledge a message on {topic}", hint="is it overloaded?")

    def read(self, timeout_s: float) -> Message | None:
        """Return the next message, or None when none comes in time.

        Raises:
            ServiceError: If the broker refused this connection meanwhile.
        """
        try:
            return self._inbox.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            self._check()
            return None

    def read_until_marker(self, timeout_s: float) -> Iterator[Message]:
        """Yield what the broker has in store: everything that comes before a message sent to ourselves.

        Raises:
            ServiceError: If the broker does not bring the message back.
        """
        marker = f"{self.reply_topic}/marker/{uuid.uuid4().hex}"
        self.subscribe(marker)
        self.publish(marker, b"{}")
        end = time.monotonic() + timeout_s
        while (message := self.read(end - time.monotonic())) is not None:
            if message.topic == marker:
                return
            yield message
        raise ServiceError(f"the broker did not answer within {timeout_s:g} s")

    def open(self) -> None:
        """Connect.

        Raises:
            ServiceError: If the broker cannot be reached or refuses.
        """
        options = self._options
        where = f"the broker {options.host}:{options.port}"
        try:
            self._client.connect(
                options.host, options.port, _KEEPALIVE_S, clean_start=True, properties=_connect_properties()
            )
        except (OSError, ValueError) as error:
            raise ServiceError(
                f"cannot reach {where}: {error}", hint="is it running, and are --host and --port right?"
            ) from error
        self._client.loop_start()
        if not self._connected.wait(options.timeout_s):
            raise ServiceError(f"{where} did not answer within {options.timeout_s:g} s")
        self._check()

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()
        # The client closes its own pipe when it is let go of, which a cycle would leave to the garbage collector.
        self._client.on_connect = self._client.on_message = self._client.on_subscribe = None

    def _make_client(self) -> BoundedClient:
        options = self._options
        client = BoundedClient(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        client.suppress_exceptions = True  # an exception in a callback would end paho's thread
        client.connect_timeout = options.timeout_s
        client.reconnect_delay_set(1, 10)
        client.max_queued_messages_set(1000)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        if options.username is not None:
            client.username_pw_set(options.username, options.password)
        if options.ca_file is not None:
            client.tls_set_context(_tls_context(options))
        return client

    def _check(self) -> None:
        if self._refusal is not None:
            raise ServiceError(f"the broker refused: {self._refusal}", hint="check user name, password and ACL")

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: paho.ConnectFlags, code: ReasonCode, _props: object
    ) -> None:
        if code.is_failure:
            self._refusal = str(code)
        elif self._filters:
            client.subscribe(list(self._filters))  # after a reconnection: the session was clean
        self._connected.set()

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _props: object
    ) -> None:
        for code in codes:
            if code.is_failure:
                self._refusal = f"a subscription: {code}"
        self._subscribed.release()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:  # noqa: ANN401
        if self._client.flooded:
            return  # no agent sends such properties, and they may hold whom the message is for
        received = Message(message.topic, bytes(message.payload), message.retain)
        try:
            self._inbox.put_nowait(received)
        except queue.Full:
            self._inbox.get_nowait()  # the oldest goes: states and samples are repeated, answers are checked for gaps
            self._inbox.put_nowait(received)


@contextmanager
def connect(options: BrokerOptions) -> Iterator[Broker]:
    """Connect for the length of a block.

    Raises:
        ConfigError: If a certificate cannot be loaded.
        ServiceError: If the broker cannot be reached or refuses.
    """
    broker = Broker(options)
    try:
        broker.open()
        yield broker
    finally:
        broker.close()


def _connect_properties() -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MAX_PACKET_BYTES
    return properties


def _tls_context(options: BrokerOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
        if options.cert_file is not None:
            context.load_cert_chain(options.cert_file, options.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the TLS files cannot be loaded: {error}") from error
    return context
