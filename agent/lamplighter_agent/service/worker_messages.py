"""What the agent and its engine worker say to each other, and how it is framed.

A frame is four bytes of length, big-endian, and that many bytes of msgpack. Both ends are the same build of the same
program joined by a socketpair, so that a frame that cannot be read means a bug or a damaged process, never bad input.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias, TypeVar

import msgspec

from lamplighter_agent.engine.events import Failed, Finished, TextDelta
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import (
    ContextOverflowError,
    EngineError,
    HashMismatchError,
    IncompatiblePackageError,
    LamplighterError,
    ManifestError,
    MemoryBudgetError,
    MissingFileError,
    PackageError,
    RequestError,
    StoreError,
    WorkerError,
)
from lamplighter_agent.package.chat_format import ChatMessage

MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
HEADER_BYTES: Final = 4
_HEADER: Final = struct.Struct(">I")


class WorkerFailure(msgspec.Struct, frozen=True, kw_only=True):
    """An error on its way to the other process; ``code``, ``param`` and ``retry_after_s`` of a ``RequestError``."""

    reason: str
    message: str
    hint: str | None = None
    code: int | None = None
    param: str | None = None
    retry_after_s: float | None = None


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer; exactly one of ``text``, ``messages`` and ``tokens`` is given.

    Attributes:
        text: Words of the user, or with ``raw`` text to continue without the chat format.
        messages: A conversation.
        tokens: Token ids as they are.
    """

    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tokens: tuple[int, ...] | None = None
    raw: bool = False


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First command: load the package in the directory ``package``."""

    package: str
    prepared_root: str | None = None
    prefix_root: str | None = None
    options: EngineOptions = EngineOptions()


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a request; ``TextDelta`` events follow, then ``Finished`` or ``Failed``; or ``Refused`` at once.

    With ``embed`` the prompt's embedding is wanted, which ``Finished`` brings.
    """

    request_id: str
    prompt: Prompt
    params: GenerationParams
    embed: bool = False


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a request early; its ``Finished`` follows. Unknown ids are ignored."""

    request_id: str


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for the tokens of a prompt; ``Tokens`` or ``Refused`` follows."""

    request_id: str
    prompt: Prompt


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for the text of tokens; ``Text`` or ``Refused`` follows."""

    request_id: str
    tokens: tuple[int, ...]


class AskStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for ``Stats``."""

    request_id: str


class ClearCaches(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget the prefixes of earlier prompts; ``Stats`` follow."""

    request_id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for a sign of life: ``Alive`` follows at once, or after the step under way."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End the process after closing the engine."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The package is loaded.

    Attributes:
        package: ``name/version``.
        load_s: Time from the command to now.
        slots: Requests generated at once.
        max_context_tokens: Prompt and generated tokens of one request together.
        rss_bytes: Resident memory now.
        plan: The memory plan that the engine keeps to, or None.
    """

    package: str
    load_s: float
    slots: int
    max_context_tokens: int
    rss_bytes: int
    plan: MemoryPlan | None = None


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The package cannot be loaded; the process ends."""

    failure: WorkerFailure


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sign of life: while there is work but nothing to say, and after a ``Ping``."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request or question could not be accepted."""

    request_id: str
    failure: WorkerFailure


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The tokens of a prompt."""

    request_id: str
    tokens: tuple[int, ...]


class Text(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The text of tokens."""

    request_id: str
    text: str


class CacheUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine's caches hold: tokens of running requests, and bytes of prefixes kept for later ones."""

    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    prefix_bytes: int = 0


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How the worker process is; ``freed_bytes`` is what a ``ClearCaches`` before gave back."""

    request_id: str
    rss_bytes: int
    peak_rss_bytes: int
    caches: CacheUse = CacheUse()
    freed_bytes: int = 0


Command: TypeAlias = Load | Generate | Cancel | Tokenize | Detokenize | AskStats | ClearCaches | Ping | Shutdown
Event: TypeAlias = Ready | LoadFailed | Alive | TextDelta | Finished | Failed | Refused | Tokens | Text | Stats
_T = TypeVar("_T")

COMMANDS: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(
    Load | Generate | Cancel | Tokenize | Detokenize | AskStats | ClearCaches | Ping | Shutdown
)
EVENTS: Final[msgspec.msgpack.Decoder[Event]] = msgspec.msgpack.Decoder(
    Ready | LoadFailed | Alive | TextDelta | Finished | Failed | Refused | Tokens | Text | Stats
)


def _too_large_for(message: Command | Event) -> str | None:
    """Return the option of a request whose number is too large for a frame, or None if none is."""
    if isinstance(message, Generate):
        for name, value in msgspec.structs.asdict(message.params).items():
            try:
                msgspec.msgpack.encode(value)
            except OverflowError:
                return name
    return None


def encode_frame(message: Command | Event) -> bytes:
    """Return the message as one frame.

    Raises:
        RequestError: If it holds a number of more than 64 bits.
        WorkerError: If it is larger than a frame may be.
    """
    try:
        body = msgspec.msgpack.encode(message)
    except OverflowError as error:
        field = _too_large_for(message)
        raise RequestError("the request holds a number of more than 64 bits", param=field) from error
    if len(body) > MAX_FRAME_BYTES:
        raise WorkerError(f"a {type(message).__name__} message of {len(body)} bytes does not fit into a frame")
    return _HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Return the body length that a header announces.

    Raises:
        WorkerError: If it is larger than a frame may be.
    """
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WorkerError(f"a frame announces {length} bytes; the worker's channel is damaged")
    return int(length)


def decode_body(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    """Return the message in a frame's body.

    Raises:
        WorkerError: If it cannot be read.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerError(f"the worker's channel is damaged: {error}") from error


def failure_of(error: LamplighterError) -> WorkerFailure:
    """Return an error in the form in which it travels."""
    request = error if isinstance(error, RequestError) else None
    return WorkerFailure(
        reason=error.reason,
        message=error.message,
        hint=error.hint,
        code=request.code if request else None,
        param=request.param if request else None,
        retry_after_s=request.retry_after_s if request else None,
    )


def failure_of_event(event: Failed) -> WorkerFailure:
    """Return what ended a request in the form of ``failure_of``."""
    return WorkerFailure(
        reason=event.reason, message=event.message, hint=event.hint, code=event.code, param=event.param
    )


_ERRORS: Final[dict[str, type[LamplighterError]]] = {
    kind.reason: kind
    for kind in (
        EngineError,
        HashMismatchError,
        IncompatiblePackageError,
        ManifestError,
        MemoryBudgetError,
        MissingFileError,
        PackageError,
        StoreError,
        WorkerError,
    )
}


def error_of(failure: WorkerFailure) -> LamplighterError:
    """Return the error that was sent, as its own class where it has one here and as ``EngineError`` elsewhere."""
    if failure.code is not None:
        kind = ContextOverflowError if failure.reason == ContextOverflowError.reason else RequestError
        return kind(
            failure.message,
            code=failure.code,
            param=failure.param,
            retry_after_s=failure.retry_after_s,
            hint=failure.hint,
        )
    return _ERRORS.get(failure.reason, EngineError)(failure.message, hint=failure.hint)
