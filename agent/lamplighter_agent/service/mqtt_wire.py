"""Our messages and settings in paho's words, and paho's in ours."""

from __future__ import annotations

from typing import Any, Final

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from lamplighter_agent.config import MqttConfig
from lamplighter_agent.service.credentials import read_password, tls_context
from lamplighter_agent.service.mqtt_bounds import MAX_PACKET_BYTES, BoundedClient
from lamplighter_agent.service.mqtt_boxes import MAX_OUTBOX
from lamplighter_agent.service.mqtt_types import Incoming, Outgoing, Subscription

CONNECT_TIMEOUT_S: Final = 10.0
MAX_IN_FLIGHT: Final = 64
_RECEIVE_MAXIMUM: Final = 64
_SESSION_EXPIRY_S: Final = 3600
_WILL_DELAY_S: Final = 5


def make_client(config: MqttConfig, client_id: str) -> BoundedClient:
    """Return a client that keeps its session at the broker and acknowledges messages only when told to.

    Raises:
        ConfigError: If the password or a TLS file cannot be read.
    """
    v5 = config.protocol == "5"
    client = BoundedClient(
        CallbackAPIVersion.VERSION2,
        client_id,
        clean_session=None if v5 else False,
        protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
        manual_ack=True,
    )
    client.suppress_exceptions = True
    client.max_inflight_messages_set(MAX_IN_FLIGHT)
    client.max_queued_messages_set(MAX_OUTBOX)
    client.connect_timeout = CONNECT_TIMEOUT_S
    if config.username is not None:
        client.username_pw_set(config.username, read_password(config))
    if context := tls_context(config):
        client.tls_set_context(context)
    properties = None
    if v5:
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = _SESSION_EXPIRY_S
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
    client.connect_async(
        config.host,
        config.port,
        config.keepalive_s,
        clean_start=False if v5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
        properties=properties,
    )
    return client


def will_properties() -> Properties:
    """Return what a will asks for: a connection that comes back soon is not called lost."""
    properties = _properties(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = _WILL_DELAY_S
    return properties


def publish_properties(message: Outgoing) -> Properties:
    """Return the properties of a message."""
    properties = _properties(PacketTypes.PUBLISH)
    properties.ContentType = "application/json"
    properties.PayloadFormatIndicator = 1
    if message.correlation is not None:
        properties.CorrelationData = message.correlation
    if message.expiry_s is not None:
        properties.MessageExpiryInterval = message.expiry_s
    return properties


def subscribe_options(subscription: Subscription) -> SubscribeOptions:
    """Return the options of a subscription."""
    send = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if subscription.stored else SubscribeOptions.RETAIN_DO_NOT_SEND
    return SubscribeOptions(qos=subscription.qos, retainAsPublished=True, retainHandling=send)


def receive_maximum(properties: Properties | None) -> int:
    """Return how many messages may be on their way at once, by what the broker granted."""
    granted: dict[str, Any] = properties.json() if properties is not None else {}  # type: ignore[no-untyped-call]
    most: int = granted.get("ReceiveMaximum", MAX_IN_FLIGHT)
    return min(MAX_IN_FLIGHT, most)


def incoming(message: paho.MQTTMessage, *, flooded: bool) -> Incoming:
    """Return a message that came; ``flooded`` if its properties were cut out.

    Raises:
        UnicodeDecodeError: If its topic is no UTF-8.
    """
    properties: dict[str, Any] = (
        message.properties.json() if message.properties is not None else {}  # type: ignore[no-untyped-call]
    )
    correlation = properties.get("CorrelationData")
    return Incoming(
        topic=message.topic,
        payload=bytes(message.payload),
        retain=message.retain,
        duplicate=message.dup,
        response_topic=properties.get("ResponseTopic"),
        correlation=bytes.fromhex(correlation) if correlation is not None else None,
        content_type=properties.get("ContentType"),
        expiry_s=properties.get("MessageExpiryInterval"),
        flooded=flooded,
    )


def _properties(kind: int) -> Properties:
    return Properties(kind)  # type: ignore[no-untyped-call]
