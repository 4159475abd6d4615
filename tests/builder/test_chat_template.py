from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from lamplighter_agent.errors import ChatTemplateError, RequestError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_builder.chat_template import compile_chat_template
from support.chat_templates import TEMPLATES
from support.tiny_model import tiny_tokenizer

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
        compile_chat_template(*TEMPLATES[name]).render([ChatMessage("system", "Answer briefly."), *TURNS])


def test_default_system_message_becomes_data() -> None:
    assert compile_chat_template(*TEMPLATES["smollm2"]).default_system == "You are a helpful AI assistant."


def test_date_becomes_data() -> None:
    assert compile_chat_template(*TEMPLATES["llama3.2"]).date_format == "%d %b %Y"


def test_template_that_changes_contents_is_refused_with_the_conversation() -> None:
    shouting = (
        "{% for message in messages %}{{ message.role + ': ' + message.content | replace('o', '0') }}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError) as caught:
        compile_chat_template(shouting, {})
    assert '[{"role": "system", "content": "Alpha one."}]' in caught.value.message
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


def assert_equal_texts(name: str, messages: list[ChatMessage]) -> None:
    source, special_tokens = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **special_tokens)  # type: ignore[no-untyped-call]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    chat_format = compile_chat_template(source, special_tokens)
    for generate in (True, False):
        expected = tokenizer.apply_chat_template(
            plain, chat_template=source, tokenize=False, add_generation_prompt=generate
        )
        segments = chat_format.render(messages, add_generation_prompt=generate)
        assert "".join(segment.text for segment in segments) == expected
