"""The connection to the broker: paho on a network thread of its own, bridged to the event loop. Bytes in, bytes out.

The thread is the only one that touches paho. It drives paho's external-loop functions itself, because paho's own
thread dies with the first exception in a callback, waits without jitter between its tries, and may deadlock when
several threads publish. Work goes to the event loop at once, so that the keep-alive never starves. A message is
acknowledged when the event loop has handled it. A connection by which nothing but prompts come is not read while many
answers wait to be sent: TCP holds the broker back, which keeps what is left. A connection that also sends must read on,
or it would never learn that what it sent has arrived.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from lamplighter_agent.config import MqttConfig
from lamplighter_agent.service.mqtt_boxes import Inbox, Outbox, Receipt
from lamplighter_agent.service.mqtt_pacing import reconnect_delay_s
from lamplighter_agent.service.mqtt_types import MqttHandlers, Outgoing, Subscription
from lamplighter_agent.service.mqtt_wire import (
    CONNECT_TIMEOUT_S,
    MAX_IN_FLIGHT,
    incoming,
    make_client,
    publish_properties,
    receive_maximum,
    subscribe_options,
    will_properties,
)

logger = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_SHORT_TICK_S: Final = 0.05
_SESSION_TAKEN_OVER: Final = 0x8E
_STABLE_S: Final = 10.0
_FIGHT_TRIES: Final = 5
_TWICE: Final = "is the device id used twice?"
_T = TypeVar("_T")


class MqttConnection:
    """A connection that is kept up until ``stop``.

    Args:
        config: The broker.
        client_id: Stable id of this client.
        subscriptions: Topic filters, at least one.
        handlers: What to call.

    Raises:
        ConfigError: If the password or a TLS file cannot be read.
    """

    def __init__(
        self, config: MqttConfig, client_id: str, subscriptions: list[Subscription], handlers: MqttHandlers
    ) -> None:
        self.connected = False
        self.last_tick_s = time.monotonic()
        self.connections = 0
        self._config = config
        self._v5 = config.protocol == "5"
        self._subscriptions = subscriptions
        self._handlers = handlers
        self._outbox = Outbox()
        self._inbox = Inbox(handlers.message, self._wake)
        self._attempt = 0
        self._unwanted: list[str] = []
        self._unacknowledged: set[int] = set()
        self._window = MAX_IN_FLIGHT
        self._stopping = threading.Event()
        self._stop_by_s = 0.0
        self._taken_over = False
        self._failure = ""
        # It may raise: before there is a socket to close.
        self._client = make_client(config, client_id)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe
        self._client.on_publish = lambda _client, _data, mid, _code, _properties: self._unacknowledged.discard(mid)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._woken = False
        self._thread = threading.Thread(target=self._run, name="mqtt-network", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start connecting in the background, once; a broker that is away is tried again and again."""
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the network thread runs."""
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """How long the network thread has given no sign of life: 0 before its start, for ever after its end."""
        if self._thread.ident is None:
            return 0.0
        return time.monotonic() - self.last_tick_s if self._thread.is_alive() else math.inf

    @property
    def dropped(self) -> int:
        """Messages that were not taken."""
        return self._outbox.dropped

    @property
    def failure(self) -> str:
        """Why the last try to connect failed, or nothing."""
        return self._failure

    def publish(self, message: Outgoing) -> bool:
        """Queue a message; False if it was dropped: QoS 0 while away, or too many waiting."""
        if message.qos == 0 and not self.connected:
            self._outbox.drop()
            return False
        if not self._outbox.put(message):
            return False
        self._wake()
        return True

    @property
    def crowded(self) -> bool:
        """True while so much waits to be sent that no more prompts should come: each of them has an answer."""
        return self._outbox.crowded

    def unsubscribe(self, topic: str) -> None:
        """End a subscription that an earlier start of the agent left in the session."""
        self._unwanted.append(topic)
        self._wake()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, disconnect in order, so that no will is sent, and end the thread."""
        self._stop_by_s = time.monotonic() + timeout_s
        self._stopping.set()
        self._wake()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s + CONNECT_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the MQTT thread did not end in time")
            return
        self._wake_read.close()
        self._wake_write.close()

    # Everything below runs in the network thread.

    def _run(self) -> None:
        tries = 0
        while not self._stopping.is_set():
            before, begun_s = self.connections, time.monotonic()
            try:
                self._connect_and_serve()
                if self.connections == before and not self._failure and not self._stopping.is_set():
                    self._note_failure(
                        "it closed the connection without an answer: is this port for TLS, or the certificate refused?"
                    )
            except (OSError, ValueError) as error:
                self._note_failure(f"{error}")
            except Exception:  # a thread's boundary: whatever paho does, the agent keeps trying
                logger.exception("the MQTT connection failed in an unexpected way")
            self._connection_lost(self._failure or "the connection was closed")
            lasted = self.connections > before and time.monotonic() - begun_s >= _STABLE_S
            tries = 0 if lasted else tries + 1
            if self.connections > before and tries == _FIGHT_TRIES:
                # Not every broker says that a session was taken over; some just close the old connection.
                logger.error("the broker ends connections soon after they begin: %s", _TWICE)
            if self._stopping.is_set():
                return
            delay = reconnect_delay_s(tries, self._config.reconnect_max_s)
            if self._taken_over:
                delay = self._config.reconnect_max_s
                self._taken_over = False
            self.last_tick_s = time.monotonic()
            self._wait(delay)

    def _wait(self, delay: float) -> None:
        end = time.monotonic() + delay
        while not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            self.last_tick_s = time.monotonic()
            self._stopping.wait(min(left, _TICK_S))

    def _connect_and_serve(self) -> None:
        will = self._handlers.will(self.connections + 1)
        if will is not None:
            properties = will_properties() if self._v5 else None
            self._client.will_set(will.topic, will.payload, qos=1, retain=True, properties=properties)
        self._attempt += 1
        self._client.reconnect()
        give_up_s = time.monotonic() + CONNECT_TIMEOUT_S
        leaving = False
        while self._client.socket() is not None:
            self.last_tick_s = time.monotonic()
            if not self.connected and time.monotonic() > give_up_s and not leaving:
                raise TimeoutError("the broker did not answer the connection request")
            if self.connected:
                self._flush()
                for number in self._inbox.take_receipts(self._attempt):
                    self._client.ack(number, 1)
                while self._unwanted:
                    self._client.unsubscribe(self._unwanted.pop())
            if self._stopping.is_set() and not leaving and self._may_leave():
                leaving = True
                self._client.disconnect()
            self._pump()

    def _may_leave(self) -> bool:
        late = time.monotonic() > self._stop_by_s
        return late or not self.connected or not (self._outbox or self._unacknowledged or self._client.want_write())

    def _pump(self) -> None:
        """Move bytes once, waiting for at most a tick."""
        connection = self._client.socket()
        if connection is None:
            return  # closed while something was sent
        assert isinstance(connection, socket.socket)
        # Bytes that TLS has already decrypted do not make the socket readable.
        buffered = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
        braked = self._handlers.braked()
        may_read = not self._inbox.full and not braked
        readers = [self._wake_read, connection] if may_read else [self._wake_read]
        writers = [connection] if self._client.want_write() else []
        timeout = 0.0 if buffered and may_read else _TICK_S
        if self._stopping.is_set() or braked:
            timeout = min(timeout, _SHORT_TICK_S)
        readable, writable, _ = select.select(readers, writers, [], timeout)
        if self._wake_read in readable:
            self._wake_read.recv(4096)
            self._woken = False  # before the boxes are looked at: what comes from now on wakes anew
        if connection in readable or (buffered and may_read):
            self._client.loop_read()
        if connection in writable:
            self._client.loop_write()
        self._client.loop_misc()

    def _flush(self) -> None:
        # Of the broker's Receive Maximum paho knows nothing.
        while message := self._outbox.take(only_unacknowledged=len(self._unacknowledged) >= self._window):
            info = self._client.publish(
                message.topic,
                message.payload,
                message.qos,
                message.retain,
                publish_properties(message) if self._v5 else None,
            )
            if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                self._outbox.put_back(message)
                return
            if message.qos > 0:
                self._unacknowledged.add(info.mid)
                if info.is_published():
                    self._unacknowledged.discard(info.mid)

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: paho.ConnectFlags, code: ReasonCode, props: Properties | None
    ) -> None:
        if code.is_failure:
            self._note_failure(f"the broker refused the connection: {code}")
            return
        self._failure = ""
        self._window = receive_maximum(props)
        if self._v5:
            self._client.subscribe([(each.topic, subscribe_options(each)) for each in self._subscriptions])
        else:
            self._client.subscribe([(each.topic, each.qos) for each in self._subscriptions])

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _props: Properties | None
    ) -> None:
        for subscription, code in zip(self._subscriptions, codes, strict=False):
            if code.is_failure:
                logger.error("the broker refused the subscription to %s: %s", subscription.topic, code)
        # Only now may the device be called online: what is sent to it from here on arrives.
        self.connections += 1
        self.connected = True
        logger.info("connected to the broker %s:%d", self._config.host, self._config.port)
        self._call(self._handlers.connected, self.connections)

    def _on_disconnect(
        self,
        _client: paho.Client,
        _data: object,
        _flags: paho.DisconnectFlags,
        code: ReasonCode,
        _props: Properties | None,
    ) -> None:
        if code.value == _SESSION_TAKEN_OVER:
            self._taken_over = True
            logger.error("another client took over this device's session: %s", _TWICE)
        self._connection_lost(str(code))

    def _connection_lost(self, reason: str) -> None:
        if not self.connected:
            return
        self.connected = False
        self._outbox.forget_unacknowledged()
        if not self._stopping.is_set():
            logger.warning("disconnected from the broker: %s", reason)
        self._call(self._handlers.disconnected, reason)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        try:
            arrived = incoming(message, flooded=self._client.flooded)
        except UnicodeDecodeError:
            return
        assert self._loop is not None
        try:
            self._inbox.put(self._loop, arrived, Receipt(self._attempt, message.mid if message.qos else 0))
        except RuntimeError:  # the event loop is closed: the process is ending
            self._stopping.set()

    def _call(self, function: Callable[[_T], None], argument: _T) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the event loop is closed: the process is ending
            self._stopping.set()

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        try:
            self._wake_write.send(b"\0")
        except OSError:
            return  # the pipe is full of wake-ups already, or closed after the end

    def _note_failure(self, failure: str) -> None:
        if failure != self._failure:  # once for each kind of trouble, not once a try
            logger.warning("no connection to the broker %s:%d: %s", self._config.host, self._config.port, failure)
        self._failure = failure
