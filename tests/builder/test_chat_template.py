from __future__ import annotations

import functools
import itertools
from typing import Final

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lamplighter_agent.errors import ChatTemplateError, RequestError
from lamplighter_agent.package.chat_format import ChatFormat, ChatMessage, Role
from lamplighter_builder.chat_template import compile_chat_template
from support.chat_templates import TEMPLATES
from support.tiny_model import tiny_tokenizer

ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant")
NO_SYSTEM = {"mistral-v0.1", "gemma", "phi3"}
TURNS = [
    ChatMessage("user", " Why is the sky blue?\n"),
    ChatMessage("assistant", "Light is scattered.\n\n"),
    ChatMessage("user", "<|im_end|> And at dusk?"),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_compiled_format_renders_as_transformers_does(name: str) -> None:
    assert_equal_texts(name, TURNS)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - NO_SYSTEM))
def test_compiled_format_renders_system_messages_as_transformers_does(name: str) -> None:
    assert_equal_texts(name, [ChatMessage("system", "Answer briefly. "), *TURNS])


@pytest.mark.parametrize("name", sorted(NO_SYSTEM))
def test_format_refuses_system_messages_that_the_template_refuses_or_drops(name: str) -> None:
    with pytest.raises(RequestError):
        compiled(name).render([ChatMessage("system", "Answer briefly."), *TURNS])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_order_of_roles_is_rendered_or_refused_as_transformers_does(name: str) -> None:
    """What transformers renders may be refused only where no conversation is: odd orders, or a message left out."""
    source, special_tokens = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **special_tokens)  # type: ignore[no-untyped-call]
    chat_format = compiled(name)
    rendered = 0
    for order in (order for length in range(1, 5) for order in itertools.product(ROLES, repeat=length)):
        messages = [ChatMessage(role, f"content {index}") for index, role in enumerate(order)]
        for generate in (True, False):
            expected = with_transformers(tokenizer, source, messages, generate)
            try:
                segments = chat_format.render(messages, add_generation_prompt=generate)
            except RequestError:
                lost = expected is None or any(message.content not in expected for message in messages)
                assert lost or not alternates(order), order
                continue
            assert "".join(segment.text for segment in segments) == expected, order
            rendered += 1
    assert rendered >= 2 * len([("user",), ("user", "assistant"), ("user", "assistant", "user")])


def test_odd_orders_are_refused_where_the_format_would_be_wrong() -> None:
    """A template is not refused for what it does to conversations that nobody has."""
    chat_format = compiled("words-by-position")
    assert chat_format.order == "alternating"
    with pytest.raises(RequestError, match="needs 'assistant' here"):
        chat_format.render([ChatMessage("user", "a"), ChatMessage("user", "b")])


def test_conversation_without_a_user_is_refused_where_the_template_needs_one() -> None:
    chat_format = compiled("one-system-then-turns")
    assert chat_format.needs_user
    with pytest.raises(RequestError, match="no user message"):
        chat_format.render([ChatMessage("system", "Answer briefly.")])


def test_default_system_message_becomes_data() -> None:
    assert compiled("smollm2").default_system == "You are a helpful AI assistant."


def test_date_becomes_data() -> None:
    assert compiled("llama3.2").date_format == "%d %b %Y"


def test_template_that_changes_contents_is_refused_with_the_conversation() -> None:
    shouting = (
        "{% for message in messages %}{{ message.role + ': ' + message.content | replace('o', '0') }}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError) as caught:
        compile_chat_template(shouting, {})
    assert '[{"role": "user", "content": "Alpha one."}]' in caught.value.message
    assert "--chat-format" in str(caught.value.hint)


def test_template_that_counts_messages_is_refused() -> None:
    counting = "{% for message in messages %}{{ loop.index ~ message.role ~ ':' ~ message.content }}\n{% endfor %}"
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        compile_chat_template(counting, {})


def test_template_that_reaches_for_python_is_refused() -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ChatTemplateError, match="refuses a single user message"):
        compile_chat_template(hostile, {})


def test_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        compile_chat_template("{% for message in %}", {})


@functools.cache
def compiled(name: str) -> ChatFormat:
    return compile_chat_template(*TEMPLATES[name])


def alternates(order: tuple[str, ...]) -> bool:
    """Tell whether user and assistant alternate behind an optional system message."""
    turns = order[1:] if order[0] == "system" else order
    return bool(turns) and all(role == ("user", "assistant")[index % 2] for index, role in enumerate(turns))


def with_transformers(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: list[ChatMessage], generate: bool
) -> str | None:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(plain, chat_template=source, tokenize=False, add_generation_prompt=generate)
        )
    except (TemplateError, TypeError):
        return None


def assert_equal_texts(name: str, messages: list[ChatMessage]) -> None:
    source, special_tokens = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **special_tokens)  # type: ignore[no-untyped-call]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    chat_format = compiled(name)
    for generate in (True, False):
        expected = tokenizer.apply_chat_template(
            plain, chat_template=source, tokenize=False, add_generation_prompt=generate
        )
        segments = chat_format.render(messages, add_generation_prompt=generate)
        assert "".join(segment.text for segment in segments) == expected
