"""Every option by its name over HTTP and MQTT, with the real engine in a real worker."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from lamplighter_agent.config import AgentConfig, DeviceConfig, LocalApiConfig, MqttConfig
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.service.openai_format import CompletionRequest
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import TestClient, mosquitto_path, running_broker
from support.service import running_api, running_box

SCHEMA = {
    "type": "object",
    "properties": {"lamp": {"type": "string", "maxLength": 8}, "lit": {"type": "boolean"}},
    "required": ["lamp", "lit"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SCHEMA, "strict": True}}
HELLO: Any = [{"role": "user", "content": "hello"}]
REPLY = "lamplighter/v1/reply/app1/answers"


@pytest.fixture(scope="module")
def real_spec(tiny_package: Path) -> WorkerSpec:
    options = EngineOptions(slots=3, max_context_tokens=256, threads=1)
    return WorkerSpec(package=tiny_package, options=options)


@pytest.fixture(scope="module")
def client(real_spec: WorkerSpec) -> Iterator[openai.OpenAI]:
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        socket = Path(folder) / "agent.sock"
        with running_api(LocalApiConfig(socket=socket), real_spec):
            transport = httpx.HTTPTransport(uds=str(socket))
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as http:
                yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def test_every_option_of_the_engine_has_its_name_in_the_api() -> None:
    assert set(GenerationParams.__struct_fields__) <= set(CompletionRequest.__struct_fields__)


def test_several_answers_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "n": 3, "seed": 4, "max_tokens": 12}
    options["temperature"] = 1.0
    whole = client.chat.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    texts = ["", "", ""]
    ends: list[str | None] = [None] * 3
    usage = None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat_logprobs_name_each_token_and_its_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        assert [entry.token, entry.logprob] == [entry.top_logprobs[0].token, entry.top_logprobs[0].logprob]
        assert len(entry.top_logprobs) == 3
        assert sum(math.exp(one.logprob) for one in entry.top_logprobs) <= 1.0 + 1e-6
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or ()
    ]
    assert streamed == logprobs.content


def test_completions_echo_the_prompt_with_its_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Why is the sky blue?", echo=True, logprobs=2, max_tokens=4, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Why is the sky blue?")
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    values: list[Any] = list(choice.logprobs.token_logprobs or ())
    assert tokens is not None
    assert offsets is not None
    assert "".join(tokens).startswith("Why is the sky blue?")
    assert values[0] is None
    assert all(value <= 0 for value in values[1:])
    assert offsets[:3] == [0, len(tokens[0]), len(tokens[0]) + len(tokens[1])]


def test_a_response_format_holds(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 150, "temperature": 1.2, "seed": 1}
    answer = client.chat.completions.create(**options, response_format=FORMAT).choices[0].message.content
    assert set(json.loads(answer or "")) == {"lamp", "lit"}
    regex = client.chat.completions.create(**options, extra_body={"guided_regex": "[0-9]{3}"}).choices[0].message
    assert re.fullmatch("[0-9]{3}", regex.content or "")


def test_beams_come_best_first_with_their_scores(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="a", n=2, max_tokens=6, extra_body={"num_beams": 3, "length_penalty": 0.5}
    )
    scores = [choice.model_extra["score"] for choice in answer.choices if choice.model_extra]
    assert len(scores) == 2
    assert scores[0] >= scores[1]


def test_embeddings_of_texts_and_tokens(client: openai.OpenAI) -> None:
    texts = ["a lamp", "a lamp at night", "a lamp"]
    answer = client.embeddings.create(model="tiny", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert sum(value * value for value in vectors[0]) == pytest.approx(1.0, abs=1e-5)
    numbers = client.embeddings.create(model="tiny", input=[5, 6, 7], encoding_format="float")
    assert (len(numbers.data), numbers.usage.prompt_tokens) == (1, 3)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input="x", dimensions=8)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 4}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"typical_p": 0}, "typical_p"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=fields)
    assert caught.value.param == param


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_options_over_mqtt(real_spec: WorkerSpec, tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        config = AgentConfig(device=DeviceConfig(id="box1"), mqtt=MqttConfig(port=broker.port))
        with running_box(config, real_spec) as box:
            box.wait_until_connected()
            app = TestClient(broker.port, "lamplighter/v1/reply/#")

            def ask(**fields: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
                message = {"prompt": "hello", "reply_to": REPLY, "max_tokens": 60, **fields}
                app.publish("lamplighter/v1/device/box1/prompt", json.dumps(message))
                deltas: list[dict[str, Any]] = []
                while True:
                    reply = json.loads(app.next_on(REPLY).payload)
                    if reply["type"] != "delta":
                        return deltas, reply
                    deltas.append(reply)

            deltas, final = ask(n=2, seed=3, temperature=1.0, logprobs=1)
            assert final["text"] == final["choices"][0]["text"] != final["choices"][1]["text"]
            for choice in final["choices"]:
                streamed = [delta["text"] for delta in deltas if delta["index"] == choice["index"]]
                assert "".join(streamed) == choice["text"]
                assert len(choice["logprobs"]) in {choice["generated_tokens"], choice["generated_tokens"] - 1}
            assert [delta["seq"] for delta in deltas] == list(range(final["seq"]))
            _, guided = ask(guided_json=SCHEMA, max_tokens=150)
            assert set(json.loads(guided["text"])) == {"lamp", "lit"}
            _, refused = ask(guided_regex="(")
            assert (refused["code"], refused["param"]) == (400, "guided_regex")
            app.close()
