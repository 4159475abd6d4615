"""What passes between the broker connection and the rest of the service; knows nothing of paho."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A message from the broker; everything but topic and payload needs MQTT 5 and is None with 3.1.1.

    Attributes:
        duplicate: The broker may have delivered it before (with 3.1.1 too).
        expiry_s: What is left of the message's expiry interval.
        flooded: Its properties were too long to be read, so that none of them is here.
    """

    topic: str
    payload: bytes
    retain: bool
    duplicate: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    content_type: str | None = None
    expiry_s: int | None = None
    flooded: bool = False


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A message to the broker; ``correlation`` and ``expiry_s`` are left out with 3.1.1.

    Attributes:
        urgent: Leaves before whatever waits and is not.
    """

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    correlation: bytes | None = None
    expiry_s: int | None = None
    urgent: bool = False


class Subscription(NamedTuple):
    """A topic filter; ``stored`` asks for the retained message at every connection (always so with 3.1.1)."""

    topic: str
    qos: int
    stored: bool = True


class Will(NamedTuple):
    """What the broker publishes, retained and with QoS 1, when this connection breaks."""

    topic: str
    payload: bytes


class MqttHandlers(NamedTuple):
    """What the connection calls; all but ``will`` in the event loop.

    Attributes:
        will: Gives the will of connection number n (from 1), if it has one. Called in the network thread: must not
            share state.
        connected: The connection number n is up and subscribed.
        disconnected: It is down; the argument says why.
        message: A message came.
        braked: True while nothing should be read; only for a connection that sends nothing. Called in the network
            thread.
    """

    will: Callable[[int], Will | None]
    connected: Callable[[int], None]
    disconnected: Callable[[str], None]
    message: Callable[[Incoming], None]
    braked: Callable[[], bool] = lambda: False
