"""What the fleet says about itself: retained status and reports, and the last telemetry. Reading apart from showing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from lamplighter_agent.errors import RequestError, ServiceError
from lamplighter_agent.service.message_codec import decode_from_device, decode_telemetry, encode
from lamplighter_agent.service.messages import (
    CommandMessage,
    EventMessage,
    ReportedMessage,
    StatusMessage,
    TelemetryMessage,
    parse_device_topic,
)
from lamplighter_fleet.broker import Broker

_STORED_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Device:
    """A device as far as it is known.

    Attributes:
        id: Its name in topics.
        status: Whether it is there, or None when it never said.
        reported: State of its update, or None.
        telemetry: Its last sample, or None.
        event: The last thing that happened, or None.
    """

    id: str
    status: StatusMessage | None = None
    reported: ReportedMessage | None = None
    telemetry: TelemetryMessage | None = None
    event: EventMessage | None = None

    @property
    def online(self) -> bool:
        """True if its last word was that it is online."""
        return self.status is not None and self.status.state == "online"


@dataclass(slots=True)
class FleetView:
    """Collects messages into devices; knows nothing of connections.

    Attributes:
        prefix: First levels of every topic.
        devices: What is known, by id.
    """

    prefix: str
    devices: dict[str, Device] = field(default_factory=dict)

    def take(self, topic: str, payload: bytes) -> Device | None:
        """Take in a message; returns the device if something about it changed, None for anything else."""
        place = parse_device_topic(self.prefix, topic)
        if place is None or not payload:
            return None
        device_id, leaf = place
        known = self.devices.get(device_id, Device(device_id))
        try:
            device = _updated(known, leaf, payload)
        except RequestError:
            return None  # not what an agent sends
        if device is None:
            return None
        self.devices[device_id] = device
        return device


def find_devices(broker: Broker, *, group: str | None = None) -> list[str]:
    """Return the ids of the devices that ever said that they are there, sorted; those of one group, or all.

    Raises:
        ServiceError: If the broker refuses or does not answer, or knows no such device.
    """
    view = FleetView(broker.prefix)
    broker.subscribe(f"{broker.prefix}/device/+/status")
    for message in broker.read_until_marker(_STORED_TIMEOUT_S):
        view.take(message.topic, message.payload)
    found = sorted(
        device.id
        for device in view.devices.values()
        if device.status is not None and (group is None or group in device.status.groups)
    )
    if not found:
        which = "no device" if group is None else f"no device of the group {group!r}"
        raise ServiceError(f"the broker knows {which}", hint="see lamplighter-fleet devices")
    return found


def list_devices(broker: Broker, *, wait_s: float = 5.0) -> list[Device]:
    """Return every device that the broker knows, sorted by id, with fresh telemetry of those that are online.

    Args:
        broker: The connection.
        wait_s: Longest wait for the telemetry of the devices that are online.

    Raises:
        ServiceError: If the broker refuses or does not answer.
    """
    view = FleetView(broker.prefix)
    broker.subscribe(*(f"{broker.prefix}/device/+/{leaf}" for leaf in ("status", "reported", "telemetry")))
    for message in broker.read_until_marker(_STORED_TIMEOUT_S):
        view.take(message.topic, message.payload)
    online = [broker.topics(device.id).device("command") for device in view.devices.values() if device.online]
    broker.publish_to_all(online, encode(CommandMessage(command="report")))
    end = time.monotonic() + wait_s
    while any(device.online and device.telemetry is None for device in view.devices.values()):
        answer = broker.read(end - time.monotonic())
        if answer is None:
            break
        view.take(answer.topic, answer.payload)
    return sorted(view.devices.values(), key=lambda device: device.id)


def _updated(device: Device, leaf: str, payload: bytes) -> Device | None:
    match leaf:
        case "status":
            status = decode_from_device(payload, StatusMessage)
            before = device.status
            if before is not None and (status.boot, status.connection) < (before.boot, before.connection):
                return None  # a will that came late
            return replace(device, status=status)
        case "reported":
            return replace(device, reported=decode_from_device(payload, ReportedMessage))
        case "telemetry":
            samples = decode_telemetry(payload)
            if not samples:
                return None
            sample = samples[-1]
            if device.telemetry is not None and sample.time_unix_s < device.telemetry.time_unix_s:
                return None  # it waited on the device while this one was already here
            return replace(device, telemetry=sample)
        case "event":
            return replace(device, event=decode_from_device(payload, EventMessage))
        case _:
            return None
