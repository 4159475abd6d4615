"""The chat format as data: how a conversation becomes prompt text without a template engine.

The builder compiles a checkpoint's Jinja template to this table and proves that both render the same text.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from lamplighter_agent.errors import RequestError

Role = Literal["system", "user", "assistant"]


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    content: str


class Segment(NamedTuple):
    """A run of prompt text.

    Attributes:
        text: The characters.
        trusted: True for text of the format itself, in which special tokens count; False for message content, in
            which they are ordinary characters.
    """

    text: str
    trusted: bool


class RoleFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Text around the content of one role's messages."""

    prefix: str
    suffix: str


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Prefixes, suffixes and rules of one model family.

    Attributes:
        begin: Text before the first message.
        roles: Format of each role that the template accepts.
        generation_prompt: Text that opens the answer.
        default_system: System text used when a conversation does not begin with a system message, or None.
    """

    begin: str
    roles: dict[Role, RoleFormat]
    generation_prompt: str
    default_system: str | None = None

    def render(self, messages: list[ChatMessage], *, add_generation_prompt: bool = True) -> list[Segment]:
        """Return the prompt as segments, in order.

        Raises:
            RequestError: If the conversation is empty or has a role or an order that the template does not allow.
        """
        if not messages:
            raise RequestError("messages is empty", param="messages", hint="send at least one user message")
        if self.default_system is not None and messages[0].role != "system":
            messages = [ChatMessage("system", self.default_system), *messages]
        segments = [Segment(self.begin, True)]
        for message in messages:
            role = self.roles.get(message.role)
            if role is None:
                raise RequestError(f"this model's chat format has no {message.role!r} messages", param="messages")
            segments += [Segment(role.prefix, True), Segment(message.content, False), Segment(role.suffix, True)]
        if add_generation_prompt:
            segments.append(Segment(self.generation_prompt, True))
        return [segment for segment in segments if segment.text]
