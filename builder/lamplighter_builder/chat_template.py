"""From a Jinja chat template to a :class:`ChatFormat`: probed with marked contents, then proved equal.

A probe renders a conversation whose contents are marks and looks at the texts between them. The format made from the
probes is then compared with the template on every order of roles up to four messages and on longer ones, with contents
that templates are known to treat in special ways. The template runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from lamplighter_agent.errors import ChatTemplateError, RequestError
from lamplighter_agent.package.chat_format import (
    DATE_MARK,
    ChatFormat,
    ChatMessage,
    Role,
)
from lamplighter_builder.chat_probe import probe_chat_format

_OVERRIDE: Final = "write the chat format as JSON and give it with --chat-format FILE"
_ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant")
_TURNS: Final[tuple[Role, Role]] = ("user", "assistant")
_THINK_END: Final = "</think>"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, with which training marks what the model says; the text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate:
    """A chat template as transformers would render it.

    Args:
        source: Jinja source.
        special_tokens: Texts by name, such as ``bos_token``, which the template may use.

    Raises:
        ChatTemplateError: If the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.date_formats: set[str] = set()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._date
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is not valid Jinja: {error}", hint=_OVERRIDE) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str | None:
        """Return the text, or None if the template refuses the conversation."""
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError):
            # What a template's expressions raise on a conversation that its author did not think of.
            return None

    def _date(self, date_format: str) -> str:
        self.date_formats.add(date_format)
        return DATE_MARK


def compile_chat_template(source: str, special_tokens: Mapping[str, str]) -> ChatFormat:
    """Return a chat format that renders what the template renders.

    Raises:
        ChatTemplateError: If there is none; it shows the first conversation on which both differ.
    """
    template = JinjaTemplate(source, special_tokens)
    try:
        return _compile(template, last_apart=False)
    except ChatTemplateError as error:
        try:
            return _compile(template, last_apart=True)
        except ChatTemplateError:
            raise error from None


def _compile(template: JinjaTemplate, *, last_apart: bool) -> ChatFormat:
    """Probe a template and narrow the format down to what it renders alike; see ``probe_chat_format``."""
    candidate = probe_chat_format(template.render, last_apart=last_apart)
    if candidate is None or len(template.date_formats) > 1:
        raise ChatTemplateError(
            "the chat template cannot be compiled: it refuses a single user message, or states dates in two ways",
            hint=_OVERRIDE,
        )
    candidate = msgspec.structs.replace(candidate, date_format=next(iter(template.date_formats), None))
    while (found := first_difference(template, candidate)) is not None:
        narrower = _without(candidate, found.messages)
        if narrower is None:
            raise ChatTemplateError(found.describe(), hint=_OVERRIDE)
        candidate = narrower
    return candidate


def _without(chat_format: ChatFormat, messages: Sequence[ChatMessage]) -> ChatFormat | None:
    """Return a format that refuses conversations of an odd kind on which it would be wrong; None for usual ones."""
    if chat_format.empty_system and any(message.role == "system" and not message.content for message in messages):
        return msgspec.structs.replace(chat_format, empty_system=False)
    if not chat_format.needs_user and not any(message.role == "user" for message in messages):
        return msgspec.structs.replace(chat_format, needs_user=True)
    if chat_format.order == "any" and not _alternates(messages):
        return msgspec.structs.replace(chat_format, order="alternating")
    return None


def _alternates(messages: Sequence[ChatMessage]) -> bool:
    """Tell whether user and assistant alternate behind an optional system message."""
    turns = messages[1:] if messages[0].role == "system" else messages
    return bool(turns) and all(turn.role == _TURNS[index % 2] for index, turn in enumerate(turns))


class Difference(NamedTuple):
    """A conversation that template and format treat differently; None stands for a refusal."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool
    expected: str | None
    found: str | None

    def describe(self) -> str:
        """Return a sentence with the conversation and both texts."""
        listed = json.dumps([msgspec.to_builtins(message) for message in self.messages], ensure_ascii=False)
        texts = ["refuses it" if text is None else f"gives {text!r}" for text in (self.expected, self.found)]
        return (
            f"the chat template cannot be compiled: on {listed} with add_generation_prompt="
            f"{self.add_generation_prompt} it {texts[0]}, the compiled format {texts[1]}"
        )


def first_difference(template: JinjaTemplate, chat_format: ChatFormat) -> Difference | None:
    """Compare template and format on generated conversations and return the first difference, or None.

    The format may refuse more than the template where the template leaves a message out of the text, where an answer
    behind the last user message holds the end of a thought, and where the format says that roles must alternate, that
    there must be a user message, or that a system message is not empty.
    """
    for messages in _conversations():
        for generate in (True, False):
            expected = template.render(messages, add_generation_prompt=generate)
            found = _render(chat_format, messages, generate)
            if expected == found:
                continue
            if found is None and expected is not None and _may_refuse(chat_format, messages, expected):
                continue
            return Difference(messages, generate, expected, found)
    return None


def _render(chat_format: ChatFormat, messages: Sequence[ChatMessage], generate: bool) -> str | None:
    try:
        # The mark stands for the date in both texts.
        undated = msgspec.structs.replace(chat_format, date_format=None)
        segments = undated.render(messages, add_generation_prompt=generate)
    except RequestError:
        return None
    return "".join(segment.text for segment in segments)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _may_refuse(chat_format: ChatFormat, messages: Sequence[ChatMessage], expected: str) -> bool:
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    if any(_THINK_END in message.content for message in messages[last_user + 1 :]):
        return True
    if chat_format.order == "alternating" and not _alternates(messages):
        return True
    if chat_format.needs_user and last_user < 0:
        return True
    if not chat_format.empty_system and any(message.role == "system" and not message.content for message in messages):
        return True
    return any(_is_lost(message, expected) for message in messages)


def _is_lost(message: ChatMessage, expected: str) -> bool:
    """Tell whether the template left a message out; its thoughts may be left out by right."""
    said = message.content.rpartition(_THINK_END)[2].strip()
    return said not in expected or (message.role == "system" and not said)


def _conversations() -> Iterator[tuple[ChatMessage, ...]]:
    """Yield conversations: all orders of up to four roles, then longer ones, in several kinds of contents."""
    orders = [order for length in range(1, 5) for order in itertools.product(_ROLES, repeat=length)]
    for length in (5, 6, 7):
        order = tuple(itertools.islice(itertools.cycle(_TURNS), length))
        orders += [order, ("system", *order)]
    for contents in _CONTENTS:
        for order in orders:
            yield tuple(ChatMessage(role, text) for role, text in zip(order, contents, strict=False))


_THOUGHTS: Final = ("x<think>a</think>\n\nbee", "<think>\n\n</think>\n\ncat", "<think>k</think>dog", "</think> elk")
_TOKENS: Final = ("<|im_end|>\n<|im_start|>system", "[/INST] x </s>", "<|eot_id|>{{ 1 }}", "{% raw %}")
_CONTENTS: Final = (
    ("Alpha one.", "Beta two?", "Gamma three!", "Delta\nfour", "Epsilon five", "Zeta six", "Eta seven", "Theta"),
    ("  lead", "trail  ", "\n\nlines\n\n", "\t tab \n", " \n mixed \n ", "a  b", "\u00a0wide\u00a0", "\r\nc"),
    (*_TOKENS, "é 漢字 🙂", "'\"\\", "0", "#"),
    (*_THOUGHTS, "<think>fox", "gnu", "hen", "yak"),
    ("", "after nothing", "comes", "", "", "lime", "", "kiwi"),
    ("given", "", "", "xylophone", "", "", "", "plum"),
)
"""Eight contents a kind, as many as the longest conversation has messages; none is part of another, so that a lost
message is seen."""
