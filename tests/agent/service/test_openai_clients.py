"""What clients of OpenAI send today and sent years ago: it works, or it is refused by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from lamplighter_agent.config import LocalApiConfig
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.service.worker import WorkerSpec
from support.service import running_api

HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def client(tiny_package: Path) -> Iterator[openai.OpenAI]:
    spec = WorkerSpec(package=tiny_package, options=EngineOptions(slots=2, max_context_tokens=256, threads=1))
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        socket = Path(folder) / "agent.sock"
        with running_api(LocalApiConfig(socket=socket), spec):
            transport = httpx.HTTPTransport(uds=str(socket))
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as http:
                yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def chat(client: openai.OpenAI, **fields: Any) -> str:  # noqa: ANN401
    wanted = {"model": "default", "messages": HELLO, "max_tokens": 4, "temperature": 0, **fields}
    answer = client.chat.completions.create(**wanted)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h"},
        {"parallel_tool_calls": False, "reasoning_effort": "low", "verbosity": "low", "modalities": ["text"]},
        {"prediction": {"type": "content", "content": "hello"}},
        {"tools": [], "tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
        {"stop": [], "n": None, "logit_bias": {}, "stream_options": None},
        {"messages": [{"role": "user", "name": "bob", "content": [{"type": "text", "text": "hello"}]}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_without_meaning_here_change_nothing(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert chat(client, **fields) == chat(client)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools are not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "tools are not supported"),
        ({"tool_choice": "required"}, "tool_choice", "tools are not supported"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "tools are not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "tools are not supported"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "1", "content": "5"}]}, "messages", "messages[1] is"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL]}]},
            "messages",
            "messages[1] is about a call",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages[0] has a part"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages[0] has the role 'robot'"),
        ({"web_search_options": {}}, "web_search_options", "the field 'web_search_options' is not known"),
        ({"audio": {"voice": "x"}}, "audio", "the field 'audio' is not known"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens: max_tokens is 0"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: logprobs is 21"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_would_change_the_answer_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body=fields)
    assert caught.value.param == param
    assert text in caught.value.message


def test_a_message_that_is_missing_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "default"}, cast_to=object)
    assert caught.value.param == "messages"


def test_an_answer_without_text_may_be_part_of_the_conversation(client: openai.OpenAI) -> None:
    empty: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": None}, *HELLO]
    assert chat(client, messages=empty) == chat(client, messages=[*HELLO, {"role": "assistant", "content": ""}, *HELLO])


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_a_seed_is_any_number_of_64_bits(client: openai.OpenAI, seed: int) -> None:
    first, again = (chat(client, seed=seed, temperature=1.0, max_tokens=8) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_does_not_fit_has_openais_code(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "word " * 2000}], stream=stream
        )
    assert caught.value.code == "context_length_exceeded"
    assert "the context on this machine is 256 tokens" in caught.value.message


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
def test_a_completion_takes_tokens_bare_and_in_a_list(client: openai.OpenAI, prompt: Any) -> None:  # noqa: ANN401
    answer = client.completions.create(model="default", prompt=prompt, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


@pytest.mark.parametrize("prompt", [["a", "b"], [[5], [6]], [], [[]], ["a", 5]])
def test_a_completion_of_several_prompts_is_refused(client: openai.OpenAI, prompt: Any) -> None:  # noqa: ANN401
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="default", prompt=prompt, max_tokens=2)
    assert caught.value.param == "prompt"


def test_many_texts_are_embedded_in_one_request(client: openai.OpenAI) -> None:
    # More of them than one client may send requests at once.
    answer = client.embeddings.create(model="default", input=[f"text {number}" for number in range(100)])
    assert [item.index for item in answer.data] == list(range(100))


def test_errors_have_their_own_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this box runs"):
        chat(client, model="gpt-4o")
    with pytest.raises(openai.NotFoundError, match="does not run 'gpt-4o'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses is not served here"):
        client.responses.create(model="default", input="hello")
