"""Messages of the MQTT protocol as typed structs; ``message_codec`` reads them. Normative text: ``PROTOCOL.md``."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from lamplighter_agent.engine.events import FinishReason, Timings, TokenLogprob, Usage
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.telemetry_message import TelemetryMessage as TelemetryMessage
from lamplighter_agent.service.topics import Topics as Topics
from lamplighter_agent.service.topics import parse_device_topic as parse_device_topic
from lamplighter_agent.update.states import Desired, UpdateReport

RequestId = Annotated[str, Meta(min_length=1, max_length=128)]
ShortText = Annotated[str, Meta(max_length=256)]
Duration = Annotated[float, Meta(gt=0, le=86_400)]
CommandName = Literal[
    "ping",
    "identify",
    "report",
    "restart_worker",
    "rollback",
    "cancel_update",
    "clear_caches",
    "set_log_level",
    "collect_diagnostics",
]
LogLevel = Literal["debug", "info", "warning", "error"]

DesiredMessage: TypeAlias = Desired
ReportedMessage: TypeAlias = UpdateReport


class PromptMessage(GenerationParams, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt: every option of ``GenerationParams`` and these fields, side by side in one JSON object.

    Exactly one of ``prompt`` and ``messages`` is given.

    Attributes:
        id: Names the request in replies and in ``cancel``; also makes it idempotent. Default: a new one.
        prompt: What the user says, or with ``raw`` the text to continue.
        messages: A conversation.
        raw: Feed ``prompt`` to the model as it stands, without the chat format.
        model: ``name`` or ``name/version`` that the asker insists on.
        reply_to: Where answers go; default: the device's own ``reply`` topic.
        correlation: Returned unchanged with every answer.
        deadline_s: Seconds from arrival within which the answer must be finished.
        stream: Send deltas before the final message.
    """

    id: RequestId | None = None
    prompt: str | None = None
    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=1000)] | None = None
    raw: bool = False
    model: ShortText | None = None
    reply_to: str | None = None
    correlation: ShortText | None = None
    deadline_s: Duration | None = None
    stream: bool = True

    def params(self) -> GenerationParams:
        """Return the generation options alone, without the deadline: there it is a time, here a duration."""
        values = msgspec.structs.asdict(self)
        options = GenerationParams(**{name: values[name] for name in GenerationParams.__struct_fields__})
        return msgspec.structs.replace(options, deadline_s=None)


class CancelMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stops a request; ``reply_to`` narrows it to the one that answers there."""

    id: RequestId
    reply_to: str | None = None


class CommandMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Asks the agent to do something once.

    Attributes:
        command: ``ping`` answers; ``identify`` tells which machine this is, and shows it to whoever looks at it;
            ``report`` sends status, reported and telemetry again; ``restart_worker`` starts the engine anew;
            ``rollback`` goes back to the previous package; ``cancel_update`` ends the update at work;
            ``clear_caches`` forgets the prefixes of earlier prompts; ``set_log_level`` lasts until the agent's end;
            ``collect_diagnostics`` answers with what a support person asks for first.
        level: For ``set_log_level``, which needs it.
    """

    command: CommandName
    level: LogLevel | None = None
    id: RequestId | None = None
    reply_to: str | None = None


class StatusMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a device is there; retained, and the will.

    Attributes:
        state: ``online`` or ``offline``.
        boot: Starts of the agent so far.
        connection: Connections to the broker since that start. A reader ignores a message whose
            ``(boot, connection)`` is lower than one it has seen: a will may come late.
        agent: The agent's version.
        package: The active package as ``name/version``, or None.
        groups: Groups whose prompts it answers.
        reason: Why it is offline: ``shutdown`` or ``connection_lost``. When online None, ``safe_mode``, or
            ``no_prompts`` when the connection for prompts does not come up.
    """

    state: Literal["online", "offline"]
    boot: int
    connection: int
    agent: str
    package: str | None = None
    groups: tuple[str, ...] = ()
    reason: str | None = None


class EventMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened on the device; ``name`` is a stable code, ``message`` a sentence."""

    name: str
    message: str
    time_unix_s: float


class DeltaReply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="delta"):
    """A piece of the answer; ``seq`` counts from 0 without gaps, ``index`` tells several answers apart."""

    id: str
    seq: int
    text: str
    index: int = 0
    correlation: str | None = None


class FinalChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of several answers, or of the best beams.

    Attributes:
        index: Which one.
        text: All of its text.
        finish_reason: Why it ended.
        generated_tokens: Its length in tokens.
        score: Of a beam: sum of log-probabilities by length to the power of the length penalty.
        logprobs: Of its tokens, if asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason
    generated_tokens: int
    score: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class FinalReply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="final"):
    """The whole answer; ends the request.

    Attributes:
        seq: Number of deltas sent before.
        text: All generated text, or its beginning when ``truncated``; of several answers the first one's.
        logprobs: Of its tokens, if asked for.
        choices: All answers, where several or beams were asked for.
        truncated: Not all fitted into one message: log-probabilities were left out, or texts cut; the deltas hold all
            of the text.
    """

    id: str
    seq: int
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str
    device: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[FinalChoice, ...] | None = None
    truncated: bool = False
    correlation: str | None = None


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The request or command was refused or failed; ends it. ``code`` follows HTTP, ``reason`` is a stable word."""

    id: str | None
    code: int
    reason: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    hint: str | None = None
    correlation: str | None = None


class ResultReply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="result"):
    """A command was done; ``data`` holds what it found, if it looks for something."""

    id: str | None
    message: str
    data: dict[str, object] | None = None
    correlation: str | None = None


Reply: TypeAlias = DeltaReply | FinalReply | ErrorReply | ResultReply
