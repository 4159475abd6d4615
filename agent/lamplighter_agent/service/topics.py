"""Topics of the MQTT protocol: building, parsing, and the rule for reply topics. Normative text: ``PROTOCOL.md``."""

from __future__ import annotations

import re
from typing import Final, Literal

from lamplighter_agent.errors import RequestError

MAX_TOPIC_BYTES: Final = 256

DeviceTopic = Literal["status", "desired", "reported", "telemetry", "event", "prompt", "cancel", "command", "reply"]

_LEVEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)


class Topics:
    """Every topic of one device.

    Args:
        prefix: First levels, without a slash at either end.
        device_id: The device.

    Raises:
        RequestError: If the device id is not 1 to 64 letters, digits, ``.``, ``_`` and ``-``.
    """

    def __init__(self, prefix: str, device_id: str) -> None:
        self.prefix = prefix
        self.device_id = _check_level(device_id, "device id")

    def device(self, leaf: DeviceTopic) -> str:
        """Return the device's topic ``leaf``."""
        return f"{self.prefix}/device/{self.device_id}/{leaf}"

    def group_prompt(self, group: str) -> str:
        """Return the topic on which one box of a group is asked.

        Raises:
            RequestError: If the group's name cannot be a topic level.
        """
        return f"{self.prefix}/group/{_check_level(group, 'group')}/prompt"

    def group_filter(self, group: str) -> str:
        """Return the shared subscription for ``group_prompt``."""
        return f"$share/{group}/{self.group_prompt(group)}"

    def group_of(self, topic: str) -> str | None:
        """Return the group whose ``group_prompt`` this topic is, or None."""
        begin, end = f"{self.prefix}/group/", "/prompt"
        group = topic.removeprefix(begin).removesuffix(end)
        return group if topic == begin + group + end and _LEVEL.fullmatch(group) else None

    def filter_of(self, topic: str) -> str:
        """Return the filter by which a message with this topic comes to the device."""
        group = self.group_of(topic)
        return topic if group is None else self.group_filter(group)

    def check_reply(self, topic: str) -> str:
        """Return ``topic`` if answers may be sent there.

        Anyone who may send a prompt chooses the reply topic, so that without this rule a prompt could make a device
        publish where its sender must not: into another device's commands, say.

        Raises:
            RequestError: If it is neither below ``reply/`` nor this device's own ``reply`` topic, or not a topic name.
        """
        reply_area = f"{self.prefix}/reply/"
        allowed = topic == self.device("reply") or (topic.startswith(reply_area) and len(topic) > len(reply_area))
        clean = not any(character in topic for character in "+#") and topic.isprintable()
        if not allowed or not clean or len(topic.encode("utf-8", "replace")) > MAX_TOPIC_BYTES:
            raise RequestError(
                f"reply topic {topic[:100]!r} is not allowed",
                param="reply_to",
                hint=f"use a topic below {reply_area} without wildcards, of at most {MAX_TOPIC_BYTES} bytes",
            )
        return topic

    def client_of(self, reply_topic: str) -> str:
        """Return the client that owns a reply topic: the level after ``reply/``, or ``reply`` for the device's own."""
        area, found, rest = reply_topic.partition(f"{self.prefix}/reply/")
        return rest.partition("/")[0] if found and not area else "reply"


def parse_device_topic(prefix: str, topic: str) -> tuple[str, str] | None:
    """Return device id and leaf of a topic ``prefix/device/id/leaf``, or None for any other topic."""
    rest = topic.removeprefix(f"{prefix}/device/")
    device_id, slash, leaf = rest.partition("/")
    if rest == topic or not slash or "/" in leaf or _LEVEL.fullmatch(device_id) is None:
        return None
    return device_id, leaf


def _check_level(name: str, what: str) -> str:
    if _LEVEL.fullmatch(name) is None:
        raise RequestError(
            f"{what} {name[:80]!r} cannot be a topic level",
            hint="use 1 to 64 letters, digits, '.', '_' and '-', and do not begin with '.' or '-'",
        )
    return name
