"""Telling a device to do something once, and waiting for its answer."""

from __future__ import annotations

import time
import uuid

import msgspec

from lamplighter_agent.errors import ServiceError
from lamplighter_agent.service.message_codec import decode_reply, encode
from lamplighter_agent.service.messages import CommandMessage, CommandName, ErrorReply, ResultReply
from lamplighter_fleet.broker import Broker
from lamplighter_fleet.untrusted import refusal


def send_command(broker: Broker, device_id: str, command: CommandName, *, timeout_s: float = 60.0) -> str:
    """Send a command and return the device's sentence about what it did; see `run_command`."""
    return run_command(broker, device_id, CommandMessage(command=command), timeout_s=timeout_s).message


def run_command(broker: Broker, device_id: str, command: CommandMessage, *, timeout_s: float = 60.0) -> ResultReply:
    """Send a command and return the device's answer. It expires with the time to wait.

    Args:
        broker: The connection.
        device_id: The device.
        command: What; ``id`` and ``reply_to`` are set here.
        timeout_s: Longest wait for the answer.

    Raises:
        RequestError: If the device refuses; or if the id cannot be a topic level.
        ServiceError: If no answer came in time.
    """
    topics = broker.topics(device_id)
    request_id = uuid.uuid4().hex
    reply_to = f"{broker.reply_topic}/{request_id}"
    broker.subscribe(reply_to)
    message = msgspec.structs.replace(command, id=request_id, reply_to=reply_to)
    broker.publish(topics.device("command"), encode(message), expiry_s=max(1, int(timeout_s)))
    end = time.monotonic() + timeout_s
    while (answer := broker.read(end - time.monotonic())) is not None:
        if answer.topic != reply_to:
            continue
        reply = decode_reply(answer.payload)
        if isinstance(reply, ResultReply):
            return reply
        if isinstance(reply, ErrorReply):
            raise refusal(reply)
    raise ServiceError(
        f"{device_id} did not answer within {timeout_s:g} s", hint="is it online? see lamplighter-fleet devices"
    )
