from __future__ import annotations

import datetime

import msgspec
import pytest

from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import (
    DATE_MARK,
    ChatFormat,
    ChatMessage,
    Reasoning,
    RoleFormat,
    Segment,
    SystemInUser,
)

CHATML = ChatFormat(
    begin="",
    roles={
        "system": RoleFormat(prefix="<|im_start|>system\n", suffix="<|im_end|>\n"),
        "user": RoleFormat(prefix="<|im_start|>user\n", suffix="<|im_end|>\n"),
        "assistant": RoleFormat(prefix="<|im_start|>assistant\n", suffix="<|im_end|>\n"),
    },
    generation_prompt="<|im_start|>assistant\n",
)
LLAMA2 = ChatFormat(
    begin="",
    roles={
        "user": RoleFormat(prefix="<s>[INST] ", suffix=" [/INST]", strip_start="whitespace", strip_end="whitespace"),
        "assistant": RoleFormat(prefix=" ", suffix=" </s>", strip_start="whitespace", strip_end="whitespace"),
    },
    generation_prompt="",
    system_in_user=SystemInUser(place="first", prefix="<<SYS>>\n", suffix="\n<</SYS>>\n\n"),
    order="alternating",
)


def user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def system(text: str) -> ChatMessage:
    return ChatMessage("system", text)


def assistant(text: str) -> ChatMessage:
    return ChatMessage("assistant", text)


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_only_the_formats_own_text_is_trusted() -> None:
    assert CHATML.render([user("<|im_end|>")]) == [
        Segment("<|im_start|>user\n", True),
        Segment("<|im_end|>", False),
        Segment("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


def test_end_text_stands_where_no_answer_is_opened() -> None:
    ended = msgspec.structs.replace(CHATML, end="<|endoftext|>")
    assert text(ended.render([user("a")], add_generation_prompt=False)) == (
        "<|im_start|>user\na<|im_end|>\n<|endoftext|>"
    )


def test_default_system_is_used_only_without_a_system_message() -> None:
    helpful = msgspec.structs.replace(CHATML, default_system="Be kind.")
    assert text(helpful.render([user("a")])).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na")
    assert "kind" not in text(helpful.render([system("Be brief."), user("a")]))


def test_system_message_is_written_into_the_first_user_message() -> None:
    found = LLAMA2.render([system("Be brief."), user("a"), assistant(" b "), user(" c ")])
    assert text(found) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]"
    assert Segment("Be brief.", False) in found


def test_system_message_for_the_last_user_message_needs_one() -> None:
    inside = SystemInUser(place="last", prefix="", suffix="\n\n")
    last = msgspec.structs.replace(LLAMA2, system_in_user=inside)
    assert text(last.render([system("S"), user("a"), assistant("b"), user("c")])).endswith("[INST] S\n\nc [/INST]")
    with pytest.raises(RequestError, match="no place for a system message"):
        last.render([system("S"), user("a"), assistant("b")])


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), user("b")],
        [assistant("a")],
        [user("a"), assistant("b"), assistant("c")],
        [user("a"), system("b")],
        [system("a")],
    ],
)
def test_roles_out_of_turn_are_refused_where_they_must_alternate(messages: list[ChatMessage]) -> None:
    with pytest.raises(RequestError) as caught:
        LLAMA2.render(messages)
    assert (caught.value.code, caught.value.param) == (400, "messages")


def test_role_without_a_format_is_refused() -> None:
    silent = msgspec.structs.replace(CHATML, roles={"user": CHATML.roles["user"]})
    with pytest.raises(RequestError, match="'system'"):
        silent.render([system("a"), user("b")])


def test_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        CHATML.render([])


def test_empty_system_message_is_refused_where_the_template_leaves_it_out() -> None:
    strict = msgspec.structs.replace(CHATML, empty_system=False)
    with pytest.raises(RequestError, match="empty system message"):
        strict.render([system(""), user("a")])


def test_thoughts_are_cut_from_earlier_answers_only() -> None:
    roles = CHATML.roles | {
        "assistant": RoleFormat(
            prefix="<|im_start|>assistant\n",
            suffix="<|im_end|>\n",
            reasoning=Reasoning(end="</think>", strip_start="newlines"),
        )
    }
    thinking = msgspec.structs.replace(CHATML, roles=roles)
    found = text(thinking.render([user("a"), assistant("<think>x</think>\n\nb"), user("c</think>d")]))
    assert "assistant\nb<|im_end|>" in found
    assert "c</think>d" in found
    with pytest.raises(RequestError, match="after the last user message"):
        thinking.render([user("a"), assistant("<think>x</think>b")])


def test_first_and_last_formats_replace_the_roles_own() -> None:
    special = msgspec.structs.replace(
        CHATML,
        first_roles={"user": RoleFormat(prefix="FIRST ", suffix="\n")},
        last_roles={"assistant": RoleFormat(prefix="LAST ", suffix="\n", strip_start="newlines")},
    )
    found = text(special.render([user("a"), assistant("\n b")], add_generation_prompt=False))
    assert found == "FIRST a\nLAST  b\n"


def test_date_mark_becomes_the_date_in_trusted_text_only() -> None:
    dated = msgspec.structs.replace(CHATML, begin=f"Today: {DATE_MARK}\n", date_format="%d %b %Y")
    found = text(dated.render([user(DATE_MARK)], today=datetime.date(2026, 7, 4)))
    assert found.startswith("Today: 04 Jul 2026\n")
    assert f"user\n{DATE_MARK}<" in found


def test_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(LLAMA2), type=ChatFormat) == LLAMA2
