"""Probing a chat template: what stands around marked contents, and what it does to their ends.

Nothing here is proved; ``chat_template.py`` compares the result with the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from lamplighter_agent.package.chat_format import (
    ChatFormat,
    ChatMessage,
    Reasoning,
    Role,
    RoleFormat,
    Strip,
    SystemInUser,
)

_THINK_END: Final = "</think>"
_CLOSERS: Final = {"<": ">", "[": "]"}
_FOLLOWS: Final[dict[Role, tuple[tuple[Role, ...], ...]]] = {
    "user": (("user", "assistant", "user"), ("user", "user"), ("user", "system")),
    "assistant": (
        ("user", "assistant", "user"),
        ("user", "assistant", "assistant", "user"),
        ("user", "assistant", "system"),
    ),
    "system": (("system", "user"), ("system", "assistant"), ("system", "system", "user")),
}
"""Conversations in which a role is followed by another one, by role."""
_BEFORE: Final[dict[Role, tuple[tuple[Role, ...], ...]]] = {
    "user": (("user", "assistant", "user"), ("user", "user")),
    "assistant": (("user", "assistant", "user"), ("user", "assistant")),
    "system": (("user", "system", "user"), ("user", "system"), ("system", "system", "user")),
}
"""Conversations in which a role is not the first, best first: not the last either, where that can be had."""


class Render(Protocol):
    """Renders a conversation with a template; None if it refuses."""

    def __call__(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str | None:
        """Return the text, None for a refusal."""


class Probed(NamedTuple):
    """The texts before, between and behind the marks, and which message each mark belongs to."""

    texts: tuple[str, ...]
    order: tuple[int, ...]


class Probe:
    """Asks a template about conversations with marked contents."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def ask(
        self, roles: Sequence[Role], *, generate: bool = False, around: tuple[int, str, str] | None = None
    ) -> Probed | None:
        """Render marks; None if the template refuses or loses one.

        Args:
            roles: Roles of the messages.
            generate: True to open an answer.
            around: Index of a message and texts to put before and behind its mark.
        """
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        contents = list(marks)
        if around is not None:
            contents[around[0]] = around[1] + marks[around[0]] + around[2]
        messages = [ChatMessage(role, text) for role, text in zip(roles, contents, strict=True)]
        text = self._render(messages, add_generation_prompt=generate)
        if text is None or any(text.count(mark) != 1 for mark in marks):
            return None
        order = sorted(range(len(marks)), key=lambda index: text.index(marks[index]))
        texts, rest = [], text
        for index in order:
            before, _, rest = rest.partition(marks[index])
            texts.append(before)
        return Probed((*texts, rest), tuple(order))

    def between(self, roles: Sequence[Role], index: int, *, generate: bool = False) -> str | None:
        """Return the text before message ``index`` (or behind the last one), if all messages keep their order."""
        found = self.ask(roles, generate=generate)
        return None if found is None or found.order != tuple(range(len(roles))) else found.texts[index]

    def suffix(self, role: Role, *, inner: bool = True, last: bool = True) -> str:
        """Return the text that follows every message of a role.

        Args:
            role: The role.
            inner: False to leave messages out that others follow.
            last: False to leave the last message out.
        """
        found = [self.between(roles, roles.index(role) + 1) for roles in _FOLLOWS[role]] if inner else []
        if last:
            alone: tuple[Role, ...] = ("user", "assistant") if role == "assistant" else (role,)
            found += [self.between(alone, len(alone), generate=generate) for generate in (True, False)]
        common = _common_prefix([text for text in found if text is not None])
        return common[: _open_token(common)]

    def later_prefix(self, role: Role, suffixes: dict[Role, str]) -> tuple[str, tuple[Role, ...]] | None:
        """Return the text before messages of a role that are not the first, and a conversation that shows it."""
        for roles in _BEFORE[role]:
            index = _last_index(roles, role)
            text = self.between(roles, index)
            if text is not None:
                return text.removeprefix(suffixes[roles[index - 1]]), roles
        return None

    def role_format(self, roles: Sequence[Role], index: int, prefix: str, suffix: str) -> RoleFormat:
        """Return the format of message ``index`` with what the template strips and cuts."""
        return RoleFormat(
            prefix=prefix,
            suffix=suffix,
            strip_start=self.strip(roles, index, start=True),
            strip_end=self.strip(roles, index, start=False),
            reasoning=self.reasoning(roles, index),
        )

    def strip(self, roles: Sequence[Role], index: int, *, start: bool, lead: str = "") -> Strip:
        """Return what the template strips from the start (behind ``lead``) or the end of a message."""
        plain = self.ask(roles, around=(index, lead, ""))
        for white, kind in ((" ", "whitespace"), ("\n", "newlines")):
            found = self.ask(roles, around=(index, lead + white, "") if start else (index, "", white))
            if found is not None and found == plain:
                return "whitespace" if kind == "whitespace" else "newlines"
        return "none"

    def reasoning(self, roles: Sequence[Role], index: int) -> Reasoning | None:
        """Return how thoughts are cut from a message, None if they are not."""
        if roles[index] != "assistant" or self.ask(roles, around=(index, f"x{_THINK_END}", "")) != self.ask(roles):
            return None
        return Reasoning(end=_THINK_END, strip_start=self.strip(roles, index, start=True, lead=f"x{_THINK_END}"))


def probe_chat_format(render: Render, *, last_apart: bool = False) -> ChatFormat | None:
    """Make a chat format from what a template does to marks; None if it refuses a single user message.

    Args:
        render: The template.
        last_apart: True to take the end of an answer that is the last message for another than that of the others.
    """
    probe = Probe(render)
    opening = probe.ask(["user"])
    if opening is None:
        return None
    suffixes: dict[Role, str] = {
        role: probe.suffix(role, last=not (last_apart and role == "assistant")) for role in _FOLLOWS
    }
    roles: dict[Role, RoleFormat] = {}
    order: Literal["any", "alternating"] = "any" if probe.ask(["user", "user"]) is not None else "alternating"
    for role in _FOLLOWS:
        found = None if role == "system" and order == "alternating" else probe.later_prefix(role, suffixes)
        if found is not None:
            prefix, example = found
            roles[role] = probe.role_format(example, _last_index(example, role), prefix, suffixes[role])
    if "user" in roles:
        # Where only a user may follow, what is common to all that follows holds the user's prefix too.
        suffixes["system"] = suffixes["system"].removesuffix(roles["user"].prefix)
    tails = [probe.between(["user"], 1, generate=generate) or "" for generate in (True, False)]
    chat_format = ChatFormat(
        begin="",
        roles=roles,
        generation_prompt=tails[0].removeprefix(suffixes["user"]),
        end=tails[1].removeprefix(suffixes["user"]),
        order=order,
        last_roles=_last_roles(probe, roles, suffixes, last_apart=last_apart),
    )
    inside = _system_in_user(probe, opening.texts[0])
    if inside is not None:
        roles.pop("system", None)
        chat_format = msgspec.structs.replace(chat_format, system_in_user=inside)
    return _with_beginning(probe, chat_format, suffixes)


def _with_beginning(probe: Probe, chat_format: ChatFormat, suffixes: dict[Role, str]) -> ChatFormat:
    """Add what is special about first messages: begin text, first formats, default system message."""
    openings: dict[Role, str] = {}
    examples: dict[Role, tuple[Role, ...]] = {
        "system": ("system", "user"),
        "user": ("user", "assistant", "user"),
        "assistant": ("assistant", "user"),
    }
    for role, example in examples.items():
        text = probe.between(example, 0)
        if text is not None and not (role == "system" and chat_format.system_in_user is not None):
            openings[role] = text
    default = _default_system(probe, openings, chat_format.roles["user"].prefix if "user" in chat_format.roles else "")
    if default is not None:
        openings = {"system": openings["system"]}
    begin = _begin(openings, chat_format.roles)
    first = {}
    for role, text in openings.items():
        role_format = probe.role_format(examples[role], 0, text.removeprefix(begin), suffixes[role])
        if role_format != chat_format.roles.get(role):
            first[role] = role_format
    return msgspec.structs.replace(chat_format, begin=begin, first_roles=first, default_system=default)


def _default_system(probe: Probe, openings: dict[Role, str], user_prefix: str) -> str | None:
    """Return the system text that the template adds when there is none."""
    behind = probe.between(["system", "user"], 1)
    if "system" not in openings or behind is None or openings["user"] == "":
        return None
    before, text = openings["system"], openings["user"]
    if not text.startswith(before) or not text.endswith(behind) or len(text) < len(before) + len(behind):
        return None
    return text[len(before) : len(text) - len(behind)] if behind.endswith(user_prefix) and before else None


def _begin(openings: dict[Role, str], roles: dict[Role, RoleFormat]) -> str:
    """Return the text before every conversation: what is left of the openings without the roles' own prefixes."""
    for role, text in openings.items():
        if role in roles and text.endswith(roles[role].prefix):
            begin = text[: len(text) - len(roles[role].prefix)]
            if all(other.startswith(begin) for other in openings.values()):
                return begin
    return ""


def _last_roles(
    probe: Probe, roles: dict[Role, RoleFormat], suffixes: dict[Role, str], *, last_apart: bool
) -> dict[Role, RoleFormat]:
    """Return formats of messages that are written in another way when they end the conversation."""
    found: dict[Role, RoleFormat] = {}
    examples: dict[Role, tuple[Role, ...]] = {"assistant": ("user", "assistant"), "user": ("user", "assistant", "user")}
    for role, example in examples.items():
        index = len(example) - 1
        text = probe.between(example, index)
        if text is None or role not in roles:
            continue
        prefix = text.removeprefix(suffixes[example[index - 1]])
        # Thoughts in a last answer are refused, so their cut is not part of its format.
        suffix = probe.suffix(role, inner=False) if last_apart and role == "assistant" else suffixes[role]
        last = msgspec.structs.replace(probe.role_format(example, index, prefix, suffix), reasoning=None)
        if last != msgspec.structs.replace(roles[role], reasoning=None):
            found[role] = last
    return found


def _system_in_user(probe: Probe, opening: str) -> SystemInUser | None:
    """Return how a system message is written inside a user message, None if it is not."""
    short = probe.ask(["system", "user"])
    long = probe.ask(["system", "user", "assistant", "user"])
    if short is None or long is None or not short.texts[0].startswith(opening):
        return None
    roles: tuple[Role, ...] = ("system", "user")
    return SystemInUser(
        place="first" if long.order[0] == 0 else "last",
        prefix=short.texts[0].removeprefix(opening),
        suffix=short.texts[1],
        strip_start=probe.strip(roles, 0, start=True),
        strip_end=probe.strip(roles, 0, start=False),
        strip_user_start=probe.strip(roles, 1, start=True),
    )


def _last_index(roles: Sequence[Role], role: Role) -> int:
    """Return the last index of a role that is not the first message; not the end either if there is another."""
    indices = [index for index, other in enumerate(roles) if other == role and index > 0]
    inner = [index for index in indices if index < len(roles) - 1]
    return (inner or indices)[-1]


def _common_prefix(texts: Sequence[str]) -> str:
    """Return the longest text that all begin with; empty if there are none."""
    if not texts:
        return ""
    lowest, highest = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))
    return lowest[:length]


def _open_token(text: str) -> int:
    """Return where an unfinished ``<…`` or ``[…`` at the end of a text begins, or its length."""
    for opener, closer in _CLOSERS.items():
        start = text.rfind(opener)
        if start > text.rfind(closer):
            return start
    return len(text)
