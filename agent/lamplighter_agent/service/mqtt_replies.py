"""Where answers may go, and how they and refusals leave by a connection."""

from __future__ import annotations

import msgspec

from lamplighter_agent.errors import LamplighterError, RequestError
from lamplighter_agent.service.message_codec import encode, error_reply
from lamplighter_agent.service.mqtt import MqttConnection
from lamplighter_agent.service.mqtt_actions import Envelope, Return
from lamplighter_agent.service.mqtt_types import Incoming, Outgoing
from lamplighter_agent.service.topics import Topics


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
            RequestError: If answers may not be sent there.
        """
        topic = message.response_topic or reply_to or self._topics.device("reply")
        return Return(self._topics.check_reply(topic), message.correlation, correlation)

    def refuse(self, message: Incoming, error: LamplighterError) -> None:
        """Tell the sender of a message what was wrong with it, as far as the message says who that is."""
        try:
            envelope = msgspec.json.decode(message.payload, type=Envelope)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            envelope = Envelope()
        request_id = envelope.id or (message.correlation.hex() if message.correlation else None)
        try:
            back = self.way(message, envelope.reply_to, envelope.correlation)
        except RequestError:
            back = Return(self._topics.device("reply"), message.correlation, envelope.correlation)
        self.send(back, encode(error_reply(error, request_id, back.correlation)))
