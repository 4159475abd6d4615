"""Following a fleet: every change that devices tell, as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

from lamplighter_agent.service.messages import (
    EventMessage,
    ReportedMessage,
    StatusMessage,
    TelemetryMessage,
    parse_device_topic,
)
from lamplighter_fleet.broker import Broker
from lamplighter_fleet.devices import Device, FleetView

Leaf = Literal["status", "reported", "telemetry", "event"]
LEAVES: tuple[Leaf, ...] = ("status", "reported", "telemetry", "event")
_TICK_S = 1.0


class Change(NamedTuple):
    """Something that a device told.

    Attributes:
        device: The device as it is known now.
        leaf: What about it is new.
        stored: True if the broker had it in store; False if it happened just now.
    """

    device: Device
    leaf: Leaf
    stored: bool

    @property
    def content(self) -> StatusMessage | ReportedMessage | TelemetryMessage | EventMessage | None:
        """What it told."""
        device = self.device
        known = {
            "status": device.status,
            "reported": device.reported,
            "telemetry": device.telemetry,
            "event": device.event,
        }
        return known[self.leaf]


def follow(
    broker: Broker, view: FleetView, *, device_id: str | None = None, for_s: float | None = None
) -> Iterator[Change | None]:
    """Yield changes as they come, and None after each second in which nothing came.

    Args:
        broker: The connection.
        view: Where what is known is collected.
        device_id: Follow this device only.
        for_s: End after this long; None: never.

    Raises:
        RequestError: If the id cannot be a topic level.
        ServiceError: If the broker refuses.
    """
    which = "+" if device_id is None else broker.topics(device_id).device_id
    broker.subscribe(*(f"{broker.prefix}/device/{which}/{leaf}" for leaf in LEAVES))
    end = None if for_s is None else time.monotonic() + for_s
    while end is None or time.monotonic() < end:
        message = broker.read(_TICK_S if end is None else min(_TICK_S, end - time.monotonic()))
        if message is None:
            yield None
            continue
        device = view.take(message.topic, message.payload)
        place = parse_device_topic(broker.prefix, message.topic)
        if device is not None and place is not None:
            yield Change(device, cast("Leaf", place[1]), message.retain)
