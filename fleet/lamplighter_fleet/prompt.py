"""Asking a device, or one of a group, over MQTT: deltas in order, then the final message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec

from lamplighter_agent.errors import RequestError, ServiceError
from lamplighter_agent.service.message_codec import decode_reply, encode
from lamplighter_agent.service.messages import CancelMessage, DeltaReply, ErrorReply, FinalReply, PromptMessage, Topics
from lamplighter_fleet.broker import Broker
from lamplighter_fleet.untrusted import refusal

_ANY_DEVICE = "any"
_MAX_EARLY = 1024


def ask_device(
    broker: Broker, device_id: str, prompt: PromptMessage, *, silence_s: float = 120.0
) -> Iterator[DeltaReply | FinalReply]:
    """Send a prompt to a device and yield its answer.

    Deltas come in the order of ``seq`` and join to the final text: what was lost on the way is made up from the final
    message. Closing the iterator early cancels the request.

    Args:
        broker: The connection.
        device_id: Who is asked.
        prompt: What; ``id`` and ``reply_to`` are set here.
        silence_s: Longest wait for the next message.

    Raises:
        RequestError: If the device refuses the prompt or fails; or if the id cannot be a topic level.
        ServiceError: If nothing comes for ``silence_s``.
    """
    topics = broker.topics(device_id)
    yield from _ask(broker, topics.device("prompt"), topics.device("cancel"), prompt, silence_s)


def ask_group(
    broker: Broker, group: str, prompt: PromptMessage, *, silence_s: float = 120.0
) -> Iterator[DeltaReply | FinalReply]:
    """Send a prompt to one device of a group, which the broker chooses; otherwise as `ask_device`.

    Raises:
        RequestError: If the device refuses the prompt or fails; or if the group cannot be a topic level.
        ServiceError: If nothing comes for ``silence_s``.
    """
    topic = Topics(broker.prefix, _ANY_DEVICE).group_prompt(group)
    yield from _ask(broker, topic, None, prompt, silence_s)


def _ask(
    broker: Broker, topic: str, cancel_topic: str | None, prompt: PromptMessage, silence_s: float
) -> Iterator[DeltaReply | FinalReply]:
    request_id = uuid.uuid4().hex
    reply_to = f"{broker.reply_topic}/{request_id}"
    broker.subscribe(reply_to)
    expiry_s = max(1, int(prompt.deadline_s or silence_s))
    question = msgspec.structs.replace(prompt, id=request_id, reply_to=reply_to)
    broker.publish(topic, encode_prompt(question), expiry_s=expiry_s)
    finished = False
    try:
        for reply in _in_order(_replies(broker, reply_to, silence_s)):
            finished = isinstance(reply, FinalReply)
            yield reply
    except RequestError:
        finished = True
        raise
    finally:
        if not finished and cancel_topic is not None:
            broker.publish(cancel_topic, encode(CancelMessage(id=request_id, reply_to=reply_to)), qos=0)


def encode_prompt(prompt: PromptMessage) -> bytes:
    """Return a prompt as JSON, without the options that are left at their default."""
    default = PromptMessage()
    values = msgspec.structs.asdict(prompt)
    given = {name: value for name, value in values.items() if value != msgspec.structs.asdict(default)[name]}
    return msgspec.json.encode(given)


def _replies(broker: Broker, topic: str, silence_s: float) -> Iterator[DeltaReply | FinalReply]:
    while True:
        end = time.monotonic() + silence_s
        message = broker.read(silence_s)
        while message is not None and message.topic != topic:
            message = broker.read(end - time.monotonic())
        if message is None:
            raise ServiceError(
                f"no answer came within {silence_s:g} s", hint="is the device online? see lamplighter-fleet devices"
            )
        reply = decode_reply(message.payload)
        if isinstance(reply, ErrorReply):
            raise refusal(reply)
        if isinstance(reply, DeltaReply | FinalReply):
            yield reply
        if isinstance(reply, FinalReply):
            return


def _in_order(replies: Iterator[DeltaReply | FinalReply]) -> Iterator[DeltaReply | FinalReply]:
    """Put deltas in order, drop repeated ones and make up for lost ones when the final message is there."""
    early: dict[int, DeltaReply] = {}
    following = 0
    shown = ""
    for reply in replies:
        if isinstance(reply, DeltaReply):
            if following <= reply.seq < following + _MAX_EARLY:
                early[reply.seq] = reply
            while (delta := early.pop(following, None)) is not None:
                following += 1
                shown += delta.text
                yield delta
            continue
        if len(shown) < len(reply.text) and reply.text.startswith(shown):
            yield DeltaReply(id=reply.id, seq=following, text=reply.text[len(shown) :], correlation=reply.correlation)
        yield reply
