"""A bound on what the sender of a message can make paho compute."""

from __future__ import annotations

from typing import Final

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion

MAX_PROPERTIES_BYTES: Final = 4096
MAX_PACKET_BYTES: Final = 256 * 1024
"""Asked of the broker, which keeps larger messages to itself."""


class BoundedClient(paho.Client):
    """paho that reads no flood of properties.

    paho copies the rest of a packet for each property, which takes seconds for 256 KiB of user properties: a few such
    messages would stop the process. Longer properties are cut out unread.

    Attributes:
        flooded: True while a message is handed over whose properties were cut out.
    """

    flooded = False

    def _handle_publish(self) -> MQTTErrorCode:
        packet = self._in_packet["packet"]
        self.flooded = False
        if self._protocol == MQTTProtocolVersion.MQTTv5:
            bare = without_flood(bytes(packet), has_number=bool(self._in_packet["command"] & 0x06))
            self.flooded = len(bare) < len(packet)
            self._in_packet["packet"] = bytearray(bare)
        return super()._handle_publish()


def without_flood(packet: bytes, *, has_number: bool) -> bytes:
    """Return the body of an MQTT 5 PUBLISH packet, without its properties if they have too many bytes.

    Args:
        packet: Topic, packet identifier, properties, payload.
        has_number: There is a packet identifier, because the QoS is not 0.
    """
    begin = 2 + int.from_bytes(packet[:2], "big") + (2 if has_number else 0)
    length, end = 0, begin
    for shift in (0, 7, 14, 21):
        byte = packet[end] if end < len(packet) else 0
        length |= (byte & 0x7F) << shift
        end += 1
        if not byte & 0x80:
            break
    return packet if length <= MAX_PROPERTIES_BYTES else packet[:begin] + b"\0" + packet[end + length :]
