"""What a caller of the library may give as a prompt."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import ChatMessage

Messages: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""Messages, as structs or as the dictionaries with ``role`` and ``content`` that OpenAI's clients take."""

Prompt: TypeAlias = str | Messages | Sequence[int]


def read_prompt(prompt: Prompt) -> str | list[ChatMessage] | list[int]:
    """Return a prompt as text, messages or Python's integers; numpy's are taken too.

    Raises:
        RequestError: If it is none of these, or mixes them.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"a prompt is a text, a list of messages or token ids, but it is a {type(prompt).__name__}", param="prompt"
        )
    items = list(prompt)
    if set(map(type, items)) == {int}:
        return items  # type: ignore[return-value]
    found = [isinstance(item, ChatMessage | Mapping) for item in items]
    if items and all(found):
        return read_messages(items)  # type: ignore[arg-type]
    if any(found):
        raise RequestError("the prompt mixes messages with something else", param="prompt")
    try:
        return [operator.index(item) for item in items]  # type: ignore[arg-type]
    except TypeError as error:
        raise RequestError(
            f"a prompt is a text, messages or token ids, but it holds something else: {error}", param="prompt"
        ) from error


def read_messages(messages: Messages) -> list[ChatMessage]:
    """Return messages as structs whose role and content are texts.

    Raises:
        RequestError: If one is of another form.
    """
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: ChatMessage | Mapping[str, object]) -> ChatMessage:
    fields = {"role": message.role, "content": message.content} if isinstance(message, ChatMessage) else message
    for name in ("role", "content"):
        if not isinstance(fields.get(name), str):
            raise RequestError(f"message {index} has {fields.get(name)!r} for {name}, not a text", param="messages")
    if len(fields) > 2:
        other = next(name for name in fields if name not in ("role", "content"))
        raise RequestError(f"message {index} has {other!r} besides role and content", param="messages")
    return message if isinstance(message, ChatMessage) else ChatMessage(fields["role"], fields["content"])  # type: ignore[arg-type]
