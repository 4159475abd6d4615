"""Bytes that nobody meant well: whatever comes in, a decoder answers with a request error or a sound message."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import RequestError
from lamplighter_agent.service.message_codec import (
    MAX_MESSAGE_BYTES,
    decode_cancel,
    decode_command,
    decode_desired,
    decode_prompt,
    error_reply,
)
from lamplighter_agent.service.messages import PromptMessage
from lamplighter_agent.service.openai_format import (
    ChatRequest,
    CompletionRequest,
    JsonObject,
    decode_body,
    error_object,
)
from lamplighter_agent.service.topics import Topics

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
FIELDS = st.sampled_from([*PromptMessage.__struct_fields__, "command", "level", "package", "version", "policy", "n"])
OBJECTS = st.dictionaries(FIELDS, JSON, max_size=8)
PAYLOADS = st.binary(max_size=300) | OBJECTS.map(lambda value: json.dumps(value).encode())


@pytest.mark.parametrize("decode", [decode_prompt, decode_cancel, decode_command, decode_desired])
@given(payload=PAYLOADS)
@settings(max_examples=150, deadline=None)
def test_every_payload_is_a_message_or_a_request_error(decode: object, payload: bytes) -> None:
    assert callable(decode)
    code = 200
    try:
        decode(payload)
    except RequestError as error:
        code = error_reply(error, None).code
    assert code == 200 or 400 <= code < 500


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@given(body=PAYLOADS | OBJECTS.map(lambda value: json.dumps({"messages": [], "prompt": "x", **value}).encode()))
@settings(max_examples=150, deadline=None)
def test_every_body_is_a_request_or_an_error_in_openais_shape(
    kind: type[ChatRequest] | type[CompletionRequest], body: bytes
) -> None:
    status, shape = 200, JsonObject()
    try:
        request = decode_body(body, kind)
        request.to_prompt()
        request.to_params()
    except RequestError as error:
        status, shape = error_object(error)
    assert status == 200 or (400 <= status < 500 and set(shape) == {"error"})


@pytest.mark.parametrize(
    "payload",
    [
        b"x" * (MAX_MESSAGE_BYTES + 1),
        b"{" * 60_000,
        b'{"messages":' + b"[" * 50_000,
        b"\xff" * 1000,
        b'{"prompt":"\xed\xa0\x80"}',
    ],
    ids=["too large", "deep objects", "deep lists", "invalid UTF-8", "a lone surrogate"],
)
def test_sizes_depths_and_encodings_are_refused(payload: bytes) -> None:
    with pytest.raises(RequestError):
        decode_prompt(payload)


@given(topic=st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_a_reply_topic_that_is_let_through_lies_in_the_reply_area(topic: str) -> None:
    topics = Topics("lamplighter/v1", "box1")
    for candidate in (topic, f"lamplighter/v1/reply/{topic}", f"lamplighter/v1/device/{topic}"):
        try:
            allowed = topics.check_reply(candidate)
        except RequestError:
            continue
        assert allowed == "lamplighter/v1/device/box1/reply" or allowed.startswith("lamplighter/v1/reply/")
        assert not set("+#\0") & set(allowed)
        assert len(allowed.encode()) <= 256
