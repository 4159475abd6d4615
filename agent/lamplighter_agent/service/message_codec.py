"""Bytes to typed messages and back: JSON, sizes, hostile input.

Bytes that an application or the fleet sends to an agent are hostile until decoded: size, encoding, nesting, types and
ranges are checked, an unknown field is an error that names it, and every failure is a ``RequestError``. Bytes that an
agent sends are read with unknown fields ignored, so that an older fleet tool understands a newer agent.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from lamplighter_agent.errors import LamplighterError, ManifestError, RequestError, WorkerError
from lamplighter_agent.service.json_faults import explain
from lamplighter_agent.service.messages import (
    CancelMessage,
    CommandMessage,
    DeltaReply,
    DesiredMessage,
    ErrorReply,
    FinalReply,
    PromptMessage,
    Reply,
    ResultReply,
    TelemetryMessage,
)

MAX_MESSAGE_BYTES: Final = 64 * 1024
WORKER_RETRY_S: Final = 2.0
_MAX_ERROR_CHARACTERS: Final = 1000

_M = TypeVar("_M", bound=msgspec.Struct)
_T = TypeVar("_T")


def decode_prompt(payload: bytes, *, content_type: str | None = None) -> PromptMessage:
    """Read a prompt: a JSON object, or any other UTF-8 text as what the user says.

    Args:
        payload: The message's bytes.
        content_type: MQTT 5's content type; ``text/plain`` keeps text that begins with a brace from being JSON.

    Raises:
        RequestError: If it is too large (code 413), empty, not UTF-8, or not a well-formed prompt.
    """
    _check_size(payload, "prompt")
    if content_type == "text/plain" or not payload.lstrip().startswith(b"{"):
        if content_type == "application/json":
            raise RequestError("a prompt of content type application/json must be a JSON object")
        try:
            message = PromptMessage(prompt=payload.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from error
    else:
        message = _decode(payload, PromptMessage, "prompt")
    if (message.prompt is None) == (message.messages is None):
        raise RequestError("a prompt needs exactly one of 'prompt' and 'messages'", param="prompt")
    if message.messages is not None and (message.raw or not message.messages):
        raise RequestError("'messages' must not be empty and cannot go with 'raw'", param="messages")
    if message.prompt is not None and not message.prompt.strip():
        raise RequestError("the prompt is empty", param="prompt", hint="send text or a JSON object")
    message.validate()
    return message


def decode_cancel(payload: bytes) -> CancelMessage:
    """Read a cancel: a JSON object, or the bare id.

    Raises:
        RequestError: If it is neither.
    """
    _check_size(payload, "cancel")
    if payload.lstrip().startswith(b"{"):
        return _decode(payload, CancelMessage, "cancel")
    try:
        return msgspec.convert({"id": payload.decode("utf-8").strip()}, CancelMessage)
    except (UnicodeDecodeError, msgspec.ValidationError) as error:
        raise RequestError(f"cancel: {error}", param="id") from error


def decode_command(payload: bytes) -> CommandMessage:
    """Read a command.

    Raises:
        RequestError: If it is not a well-formed, known command.
    """
    command = _decode(payload, CommandMessage, "command")
    if (command.level is not None) != (command.command == "set_log_level"):
        raise RequestError("'level' is for the command set_log_level, which needs it", param="level")
    return command


def decode_desired(payload: bytes) -> DesiredMessage:
    """Read what a device shall run.

    Raises:
        RequestError: If it is not well-formed.
    """
    desired = _decode(payload, DesiredMessage, "desired")
    try:
        _ = desired.reference
    except ManifestError as error:
        raise RequestError(f"desired: {error.message}", hint=error.hint) from error
    return desired


def decode_reply(payload: bytes) -> Reply:
    """Read an answer.

    Raises:
        RequestError: If it is not one.
    """
    return _decode_any(payload, _REPLY_DECODER, "reply")


def decode_telemetry(payload: bytes) -> list[TelemetryMessage]:
    """Read a telemetry message: one sample, or a batch of them, oldest first.

    Raises:
        RequestError: If it is neither.
    """
    if payload.lstrip().startswith(b"["):
        return _decode_any(payload, _BATCH_DECODER, "telemetry")
    return [_decode(payload, TelemetryMessage, "telemetry")]


def decode_from_device(payload: bytes, kind: type[_M]) -> _M:
    """Read a ``StatusMessage``, ``ReportedMessage``, ``TelemetryMessage`` or ``EventMessage`` of a device.

    Raises:
        RequestError: If it is not one.
    """
    return _decode(payload, kind, kind.__name__)


def encode(message: msgspec.Struct) -> bytes:
    """Return any message as JSON."""
    return msgspec.json.encode(message)


def encode_telemetry(samples: list[TelemetryMessage]) -> bytes:
    """Return one sample as a JSON object, several as a list."""
    return msgspec.json.encode(samples[0] if len(samples) == 1 else samples)


def encode_final(message: FinalReply) -> bytes:
    """Return a final reply as JSON of at most ``MAX_MESSAGE_BYTES``, with what is left out or cut where it must be."""
    data = encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        choices = message.choices and tuple(msgspec.structs.replace(one, logprobs=None) for one in message.choices)
        message = msgspec.structs.replace(message, logprobs=None, choices=choices, truncated=True)
        data = encode(message)
    while len(data) > MAX_MESSAGE_BYTES:
        # Of a character's bytes in JSON there are at most six.
        cut = max(1, (len(data) - MAX_MESSAGE_BYTES) // 6 // (1 + len(message.choices or ())))
        choices = message.choices and tuple(
            msgspec.structs.replace(one, text=one.text[: max(len(one.text) - cut, 0)]) for one in message.choices
        )
        text = message.text[: max(len(message.text) - cut, 0)]
        message = msgspec.structs.replace(message, text=text, choices=choices)
        data = encode(message)
    return data


def error_reply(error: LamplighterError, request_id: str | None, correlation: str | None = None) -> ErrorReply:
    """Return the message that tells an asker about ``error``.

    A ``RequestError`` brings its code. A lost worker is 503 and worth a retry; every other failure is 500.
    """
    code, param, retry_after_s = 500, None, None
    if isinstance(error, RequestError):
        code, param, retry_after_s = error.code, error.param, error.retry_after_s
    elif isinstance(error, WorkerError):
        code, retry_after_s = 503, WORKER_RETRY_S
    return ErrorReply(
        id=request_id,
        code=code,
        reason=error.reason,
        message=error.message[:_MAX_ERROR_CHARACTERS],
        param=param,
        retry_after_s=retry_after_s,
        hint=error.hint,
        correlation=correlation,
    )


_REPLY_DECODER: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(
    DeltaReply | FinalReply | ErrorReply | ResultReply
)
_BATCH_DECODER: Final = msgspec.json.Decoder(list[TelemetryMessage])


def _decode(payload: bytes, kind: type[_M], what: str) -> _M:
    return _decode_any(payload, msgspec.json.Decoder(kind), what)


def _decode_any(payload: bytes, decoder: msgspec.json.Decoder[_T], what: str) -> _T:
    _check_size(payload, what)
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = explain(error, payload)
        raise RequestError(f"{what}: {fault.text}", param=fault.param) from error


def _check_size(payload: bytes, what: str) -> None:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RequestError(
            f"the {what} has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are accepted",
            code=413,
            hint="shorten it, or use the local API",
        )
