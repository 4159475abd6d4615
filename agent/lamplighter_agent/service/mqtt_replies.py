"""Where answers may go, and how they and refusals leave by a connection."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service.message_codec import encode, error_reply
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_actions import Envelope, Return
from lamplighter_agent.service.mqtt_types import Incoming, Outgoing
from lamplighter_agent.service.topics import Topics

MAX_CORRELATION_BYTES: Final = 256
_MAX_ID: Final = 128


class Replies:
    """Answers to what came by a connection.

    Args:
        connection: What they leave by.
        topics: Of this device.
        urgent: Whether they leave before other answers.
    """

    def __init__(self, connection: MqttConnection, topics: Topics, *, urgent: bool = False) -> None:
        self._connection = connection
        self._topics = topics
        self._urgent = urgent

    def send(self, back: Return, payload: bytes, *, qos: int = 1) -> None:
        """Send an answer."""
        self._connection.publish(
            Outgoing(topic=back.topic, payload=payload, qos=qos, correlation=back.correlation_data, urgent=self._urgent)
        )

    def way(self, message: Incoming, reply_to: str | None, correlation: str | None) -> Return:
        """Return where the answer goes; an MQTT property wins over its JSON field.

        Raises:
            RequestError: If answers may not be sent there, or would have to repeat too much.
        """
        topic = self._topic(message, reply_to)
        if message.flooded:
            raise RequestError("the message's properties are too long to be read", code=413, hint="send fewer of them")
        if message.correlation is not None and len(message.correlation) > MAX_CORRELATION_BYTES:
            raise RequestError(
                f"the correlation data have {len(message.correlation)} bytes; at most {MAX_CORRELATION_BYTES} are "
                "repeated with every answer",
                param="correlation",
            )
        return Return(topic, message.correlation, correlation)

    def refuse(self, message: Incoming, error: LamplighterError) -> None:
        """Tell the sender of a message what was wrong with it, as far as the message says who that is.

        What is repeated of the message is bounded: a refusal must not be larger than an answer may be.
        """
        try:
            envelope = msgspec.json.decode(message.payload, type=Envelope)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            envelope = Envelope()
        try:
            topic = self._topic(message, envelope.reply_to)
        except RequestError:
            topic = self._topics.device("reply")
        data, correlation = message.correlation, envelope.correlation
        if data is not None and len(data) > MAX_CORRELATION_BYTES:
            data = None
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            correlation = None
        request_id = id_of(message) if envelope.id is None else envelope.id
        if request_id is not None and len(request_id) > _MAX_ID:
            request_id = None
        self.send(Return(topic, data, correlation), encode(error_reply(error, request_id, correlation)))

    def _topic(self, message: Incoming, reply_to: str | None) -> str:
        return self._topics.check_reply(message.response_topic or reply_to or self._topics.device("reply"))


def id_of(message: Incoming) -> str | None:
    """Return the id of a message that has none in its JSON: its correlation data, or their hash if they are long."""
    data = message.correlation
    if not data:
        return None
    return data.hex() if len(data) <= _MAX_ID // 2 else hashlib.sha256(data).hexdigest()
