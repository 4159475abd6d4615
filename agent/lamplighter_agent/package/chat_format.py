"""The chat format as data: how a conversation becomes prompt text without a template engine.

The builder compiles a checkpoint's Jinja template to this table and proves that both render the same text. What no
field here can say is not guessed: the builder refuses such a template.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from lamplighter_agent.errors import RequestError

Role = Literal["system", "user", "assistant"]
Strip = Literal["none", "newlines", "whitespace"]

DATE_MARK: Final = "{{date}}"
"""Stands in a format's own texts for today's date, written as ``date_format`` says."""


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


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """How thoughts are left out of earlier answers.

    Attributes:
        end: Everything up to the last occurrence of this text is left out.
        strip_start: What is stripped from the start of the rest.
    """

    end: str
    strip_start: Strip = "none"


class RoleFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Text around the content of one role's messages, and what is stripped from the content's ends."""

    prefix: str
    suffix: str
    strip_start: Strip = "none"
    strip_end: Strip = "none"
    reasoning: Reasoning | None = None


class SystemInUser(msgspec.Struct, frozen=True, kw_only=True):
    """A leading system message written inside a user message, before its content.

    Attributes:
        place: The user message that holds it: the first one, or the one that ends the conversation.
        prefix: Text before the system message.
        suffix: Text between it and the user's content.
        strip_start: What is stripped from the start of the system message.
        strip_end: What is stripped from its end.
        strip_user_start: What is stripped from the start of the user's content behind it.
    """

    place: Literal["first", "last"]
    prefix: str
    suffix: str
    strip_start: Strip = "none"
    strip_end: Strip = "none"
    strip_user_start: Strip = "none"


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Prefixes, suffixes and rules of one model family.

    Attributes:
        begin: Text before the first message.
        roles: Format of each role that has messages of its own.
        first_roles: Formats that replace those of ``roles`` for the first message.
        last_roles: Formats that replace those of ``roles`` for the last message, if a user message is before it.
        generation_prompt: Text that opens the answer.
        end: Text after the last message where no answer is opened.
        default_system: System text used when a conversation does not begin with a system message, or None.
        empty_system: True if a system message may be empty.
        needs_user: True if a conversation must have a user message.
        system_in_user: How a leading system message is written inside a user message, or None.
        order: ``any``, or ``alternating``: an optional system message, then user and assistant in turn.
        date_format: ``strftime`` format of the date that replaces ``DATE_MARK``, or None.
    """

    begin: str
    roles: dict[Role, RoleFormat]
    generation_prompt: str
    first_roles: dict[Role, RoleFormat] = {}
    last_roles: dict[Role, RoleFormat] = {}
    end: str = ""
    default_system: str | None = None
    empty_system: bool = True
    needs_user: bool = False
    system_in_user: SystemInUser | None = None
    order: Literal["any", "alternating"] = "any"
    date_format: str | None = None

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        today: datetime.date | None = None,
    ) -> list[Segment]:
        """Return the prompt as segments, in order; neighbours of one kind are joined.

        Args:
            messages: The conversation.
            add_generation_prompt: True to open an answer at the end.
            today: Date for formats that state it; None for the clock's.

        Raises:
            RequestError: If the conversation is empty or has a role or an order that the template does not allow.
        """
        if not messages:
            raise RequestError("messages is empty", param="messages", hint="send at least one user message")
        turns = list(messages)
        if self.default_system is not None and turns[0].role != "system":
            turns.insert(0, ChatMessage("system", self.default_system))
        elif not self.empty_system and any(turn.role == "system" and not turn.content for turn in turns):
            raise RequestError("this model's chat format allows no empty system message", param="messages")
        if self.needs_user and not any(turn.role == "user" for turn in turns):
            raise RequestError("the conversation has no user message", param="messages")
        system = turns.pop(0) if self.system_in_user is not None and turns[0].role == "system" else None
        self._check_order(turns)
        host = self._system_host(turns) if system is not None else None
        segments = [Segment(self.begin, True)]
        for index, turn in enumerate(turns):
            role = self._role(turns, index)
            segments.append(Segment(role.prefix, True))
            if system is not None and self.system_in_user is not None and index == host:
                segments += _hosted(system.content, turn.content, self.system_in_user, role)
            else:
                segments.append(Segment(self._content(turns, index, role), False))
            segments.append(Segment(role.suffix, True))
        segments.append(Segment(self.generation_prompt if add_generation_prompt else self.end, True))
        return _join(segments if self.date_format is None else _dated(segments, self.date_format, today))

    def _check_order(self, turns: list[ChatMessage]) -> None:
        if self.order == "any":
            return
        start = 1 if turns and turns[0].role == "system" else 0
        for index, turn in enumerate(turns[start:]):
            expected = "assistant" if index % 2 else "user"
            if turn.role != expected:
                raise RequestError(
                    f"message {start + index} is of {turn.role!r}, but the chat format needs {expected!r} here",
                    param="messages",
                    hint="after an optional system message, user and assistant must alternate",
                )
        if len(turns) == start:
            raise RequestError("the conversation has no user message", param="messages")

    def _system_host(self, turns: list[ChatMessage]) -> int:
        """Return the index of the user message that holds the system message."""
        assert self.system_in_user is not None
        users = [index for index, turn in enumerate(turns) if turn.role == "user"]
        if not users or (self.system_in_user.place == "last" and users[-1] != len(turns) - 1):
            raise RequestError(
                "this model's chat format has no place for a system message in this conversation",
                param="messages",
                hint="end the conversation with a user message",
            )
        return users[0] if self.system_in_user.place == "first" else users[-1]

    def _role(self, turns: list[ChatMessage], index: int) -> RoleFormat:
        name = turns[index].role
        role = self.roles.get(name)
        if index == 0:
            role = self.first_roles.get(name, role)
        elif index == len(turns) - 1 and any(turn.role == "user" for turn in turns[:index]):
            role = self.last_roles.get(name, role)
        if role is None:
            raise RequestError(f"this model's chat format has no {name!r} messages here", param="messages")
        return role

    def _content(self, turns: list[ChatMessage], index: int, role: RoleFormat) -> str:
        content = turns[index].content
        usual = self.roles.get(turns[index].role, role)
        reasoning = role.reasoning or (usual.reasoning if index == len(turns) - 1 else None)
        if reasoning is not None and reasoning.end in content:
            if not any(turn.role == "user" for turn in turns[index:]):
                raise RequestError(
                    f"message {index} holds {reasoning.end!r} after the last user message",
                    param="messages",
                    hint="leave the thoughts out of the answer that is to be continued",
                )
            content = _strip(content.rpartition(reasoning.end)[2], reasoning.strip_start, "none")
        return _strip(content, role.strip_start, role.strip_end)


def _strip(text: str, start: Strip, end: Strip) -> str:
    if start != "none":
        text = text.lstrip("\n") if start == "newlines" else text.lstrip()
    if end != "none":
        text = text.rstrip("\n") if end == "newlines" else text.rstrip()
    return text


def _hosted(system: str, user: str, inside: SystemInUser, role: RoleFormat) -> list[Segment]:
    """Return a system message and the content of the user message that holds it."""
    content = _strip(user, inside.strip_user_start, role.strip_end)
    # A template that strips only the end strips both messages together: an empty content leaves it the text before.
    together = not content and inside.strip_user_start == "none"
    return [
        Segment(inside.prefix, True),
        Segment(_strip(system, inside.strip_start, inside.strip_end), False),
        Segment(_strip(inside.suffix, "none", role.strip_end) if together else inside.suffix, True),
        Segment(content, False),
    ]


def _dated(segments: list[Segment], date_format: str, today: datetime.date | None) -> list[Segment]:
    date = (today or datetime.datetime.now(tz=datetime.UTC).astimezone().date()).strftime(date_format)
    return [Segment(text.replace(DATE_MARK, date) if trusted else text, trusted) for text, trusted in segments]


def _join(segments: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if joined and joined[-1].trusted == segment.trusted:
            segment = Segment(joined.pop().text + segment.text, segment.trusted)
        joined.append(segment)
    return joined
