"""What the device on MQTT needs of the rest of the agent, and what it keeps of a message to answer it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from lamplighter_agent.service.commands import Outcome
from lamplighter_agent.service.messages import CommandMessage, DesiredMessage


class Actions(NamedTuple):
    """What the rest of the agent does for messages.

    Attributes:
        command: Carries a command out and returns what came of it; may raise ``LamplighterError``.
        desired: Takes note of the wanted package; must not block.
        connected: Called after each birth message.
        package: Gives the active package as ``name/version``, or None.
        concern: Gives what is wrong although the device is online (``safe_mode``), or None.
    """

    command: Callable[[CommandMessage], Awaitable[Outcome]]
    desired: Callable[[DesiredMessage], None]
    connected: Callable[[], None]
    package: Callable[[], str | None]
    concern: Callable[[], str | None] = lambda: None


class Return(NamedTuple):
    """Where an answer goes, and what it repeats."""

    topic: str
    correlation_data: bytes | None
    correlation: str | None


class Envelope(msgspec.Struct):
    """What is needed to tell the sender of a bad message about it; read with everything else ignored."""

    id: str | None = None
    reply_to: str | None = None
    correlation: str | None = None
