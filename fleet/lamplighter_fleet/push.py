"""Telling a device which package to run, and following what becomes of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from lamplighter_agent.errors import RequestError, ServiceError
from lamplighter_agent.service.messages import ReportedMessage, StatusMessage, decode_from_device, encode
from lamplighter_agent.update.states import Desired, PackageRef, UpdatePolicy
from lamplighter_fleet.broker import Broker


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
    """Make a package the desired one of a device and wait for the outcome.

    The wish is retained: a device that is away takes it up when it comes back, also after this function gave up.

    Args:
        broker: The connection.
        device_id: The device.
        reference: The package.
        policy: How it may be taken into use; None: the defaults.
        requested_by: Who asked, for the device's log.
        timeout_s: Bound on the whole.
        progress: Called with every report of this wish, the last one included.

    Returns:
        The last report; its state is final.

    Raises:
        RequestError: If the id cannot be a topic level.
        ServiceError: If no final report came in time.
    """
    topics = broker.topics(device_id)
    wish = Desired(
        package=reference.name,
        version=reference.version,
        id=uuid.uuid4().hex,
        policy=policy or UpdatePolicy(),
        requested_by=requested_by,
    )
    broker.subscribe(topics.device("reported"), topics.device("status"))
    broker.publish(topics.device("desired"), encode(wish), retain=True)
    end = time.monotonic() + timeout_s
    last: ReportedMessage | None = None
    online: bool | None = None
    while (message := broker.read(end - time.monotonic())) is not None:
        try:
            if message.topic == topics.device("status"):
                online = decode_from_device(message.payload, StatusMessage).state == "online"
            elif message.topic == topics.device("reported"):
                report = decode_from_device(message.payload, ReportedMessage)
                if report.id != wish.id:
                    continue
                last = report
                progress(report)
                if report.state.is_final:
                    return report
        except RequestError:
            continue  # something else is on the device's topic; what the device says comes again
    raise ServiceError(
        _silence(device_id, timeout_s, last, online), hint="the wish stays: the device may still follow it"
    )


def _silence(device_id: str, timeout_s: float, last: ReportedMessage | None, online: bool | None) -> str:
    if last is not None:
        return f"{device_id} was still {last.state.value} after {timeout_s:g} s"
    known = {None: "has never been seen", True: "is online but said nothing", False: "is offline"}[online]
    return f"{device_id} {known}; waited {timeout_s:g} s"
