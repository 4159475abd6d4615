"""The messages of OpenAI's chat requests: what of them this agent has, and what it refuses by name; no IO."""

from __future__ import annotations

from typing import Final

import msgspec

from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import ChatMessage, Role

NO_TOOLS: Final = "tools are not supported"
TOOLS_HINT: Final = "describe them in a message, or ask for a JSON answer with response_format"
_ROLES: Final[dict[str, Role]] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; only text is understood."""

    type: str
    text: str | None = None


class ApiMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | tuple[ContentPart, ...] | None = None
    tool_calls: object = None
    function_call: object = None


def conversation(messages: tuple[ApiMessage, ...]) -> tuple[ChatMessage, ...]:
    """Return the messages as the chat format takes them.

    Raises:
        RequestError: If one has something else than text, a role that there is not, or to do with tools.
    """
    return tuple(_message(message, index) for index, message in enumerate(messages))


def _message(message: ApiMessage, index: int) -> ChatMessage:
    where = f"messages[{index}]"
    if message.role in {"tool", "function"} or message.tool_calls or message.function_call:
        raise RequestError(f"{where} is about a call of a tool; {NO_TOOLS}", param="messages", hint=TOOLS_HINT)
    role = _ROLES.get(message.role)
    if role is None:
        raise RequestError(
            f"{where} has the role {message.role[:40]!r}", param="messages", hint="use system, user, assistant"
        )
    return ChatMessage(role, _text(message, where))


def _text(message: ApiMessage, where: str) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":
            return ""  # what a client keeps of an answer that had no text
        raise RequestError(f"{where} has no content", param="messages")
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"{where} has a part of type {part.type[:40]!r}; only text is understood", param="messages"
            )
    return "".join(part.text or "" for part in content)
