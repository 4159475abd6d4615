"""Telling devices which package to run, and following what becomes of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

import msgspec

from lamplighter_agent.errors import RequestError, ServiceError
from lamplighter_agent.service.message_codec import decode_from_device, encode
from lamplighter_agent.service.messages import ReportedMessage, StatusMessage
from lamplighter_agent.service.messages import parse_device_topic as parse_topic
from lamplighter_agent.update.states import Desired, PackageRef, UpdatePolicy
from lamplighter_fleet.broker import Broker, Message


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a wish on one device.

    Attributes:
        device: Its id.
        report: Its last report of this wish, or None when it said nothing about it.
        online: Whether it is there, or None when it was never seen.
    """

    device: str
    report: ReportedMessage | None = None
    online: bool | None = None

    @property
    def ended(self) -> bool:
        """True if the device has nothing more to say about the wish."""
        return self.report is not None and self.report.state.is_final


def push(
    broker: Broker,
    device_id: str,
    reference: PackageRef,
    *,
    policy: UpdatePolicy | None = None,
    requested_by: str = "",
    timeout_s: float = 600.0,
    progress: Callable[[ReportedMessage], None] = lambda report: None,
) -> ReportedMessage:
    """Make a package the desired one of a device and wait for the outcome; see `push_all`.

    Returns:
        The last report; its state is final.

    Raises:
        RequestError: If the id cannot be a topic level.
        ServiceError: If no final report came in time.
    """
    (outcome,) = push_all(
        broker,
        [device_id],
        reference,
        policy=policy,
        requested_by=requested_by,
        timeout_s=timeout_s,
        progress=lambda _device, report: progress(report),
    )
    if outcome.report is None or not outcome.ended:
        raise ServiceError(silence(outcome, timeout_s), hint="the wish stays: the device may still follow it")
    return outcome.report


def push_all(
    broker: Broker,
    device_ids: Sequence[str],
    reference: PackageRef,
    *,
    policy: UpdatePolicy | None = None,
    requested_by: str = "",
    timeout_s: float = 600.0,
    progress: Callable[[str, ReportedMessage], None] = lambda device, report: None,
) -> list[Outcome]:
    """Make a package the desired one of some devices and wait until each has said how it ended.

    The wish is retained: a device that is away takes it up when it comes back, also after this function gave up.

    Args:
        broker: The connection.
        device_ids: The devices.
        reference: The package.
        policy: How it may be taken into use; None: the defaults.
        requested_by: Who asked, for the device's log.
        timeout_s: Bound on the whole.
        progress: Called with the device's id and every report of this wish, the last one included.

    Returns:
        What is known at the end or when the time is over, one for each device, in their order.

    Raises:
        RequestError: If an id cannot be a topic level.
    """
    wish = Desired(
        package=reference.name,
        version=reference.version,
        id=uuid.uuid4().hex,
        policy=policy or UpdatePolicy(),
        requested_by=requested_by,
    )
    outcomes = {device_id: Outcome(device=device_id) for device_id in device_ids}
    topics = [broker.topics(device_id) for device_id in outcomes]
    which = topics[0].device_id if len(topics) == 1 else "+"
    broker.subscribe(*(f"{broker.prefix}/device/{which}/{leaf}" for leaf in ("reported", "status")))
    broker.publish_to_all([each.device("desired") for each in topics], encode(wish), retain=True)
    end = time.monotonic() + timeout_s
    while not all(outcome.ended for outcome in outcomes.values()):
        message = broker.read(end - time.monotonic())
        if message is None:
            break
        _take(broker.prefix, message, wish.id, outcomes, progress)
    return list(outcomes.values())


def silence(outcome: Outcome, waited_s: float) -> str:
    """Return a sentence about a device that has not come to an end in time."""
    if outcome.report is not None:
        return f"{outcome.device} was still {outcome.report.state.value} after {waited_s:g} s"
    known = {None: "has never been seen", True: "is online but said nothing", False: "is offline"}[outcome.online]
    return f"{outcome.device} {known}; waited {waited_s:g} s"


def _take(
    prefix: str,
    message: Message,
    wish_id: str,
    outcomes: dict[str, Outcome],
    progress: Callable[[str, ReportedMessage], None],
) -> None:
    place = parse_topic(prefix, message.topic)
    if place is None or place[0] not in outcomes:
        return
    device_id, leaf = place
    before = outcomes[device_id]
    try:
        if leaf == "status":
            online = decode_from_device(message.payload, StatusMessage).state == "online"
            outcomes[device_id] = msgspec.structs.replace(before, online=online)
        elif leaf == "reported":
            report = decode_from_device(message.payload, ReportedMessage)
            if report.id == wish_id and not before.ended:
                outcomes[device_id] = msgspec.structs.replace(before, report=report)
                progress(device_id, report)
    except RequestError:
        return  # something else is on the device's topic; what the device says comes again
