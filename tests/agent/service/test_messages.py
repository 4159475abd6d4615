"""Topics and messages: what is documented decodes, what is hostile is refused with the right code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.engine.events import Timings, Usage
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import EngineError, LamplighterError, RequestError, WorkerError
from lamplighter_agent.service.message_codec import (
    MAX_MESSAGE_BYTES,
    decode_cancel,
    decode_command,
    decode_desired,
    decode_from_device,
    decode_prompt,
    decode_reply,
    encode_final,
    error_reply,
)
from lamplighter_agent.service.messages import (
    CancelMessage,
    EventMessage,
    FinalReply,
    ReportedMessage,
    StatusMessage,
    TelemetryMessage,
)
from lamplighter_agent.service.topics import Topics, parse_device_topic

PROTOCOL = Path(__file__).parents[3] / "agent" / "PROTOCOL.md"
DECODERS: dict[str, Callable[[bytes], object]] = {
    "prompt": decode_prompt,
    "cancel": decode_cancel,
    "command": decode_command,
    "desired": decode_desired,
    "reply": decode_reply,
    "status": lambda data: decode_from_device(data, StatusMessage),
    "reported": lambda data: decode_from_device(data, ReportedMessage),
    "telemetry": lambda data: decode_from_device(data, TelemetryMessage),
    "event": lambda data: decode_from_device(data, EventMessage),
}
EXAMPLES = re.findall(r"<!-- (\w+) -->\n```json\n(.*?)```", PROTOCOL.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "text"), EXAMPLES, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(EXAMPLES)]
)
def test_every_example_of_the_protocol_decodes(kind: str, text: str) -> None:
    message = DECODERS[kind](text.encode())
    known = getattr(type(message), "__struct_fields__", ())
    assert set(json.loads(text)) - {"type"} <= set(known)


def test_the_protocol_shows_every_kind_of_message() -> None:
    assert {kind for kind, _ in EXAMPLES} == set(DECODERS)


def test_a_prompts_options_become_generation_params_without_the_deadline() -> None:
    prompt = decode_prompt(b'{"prompt": "x", "temperature": 0.5, "stop": ["a"], "deadline_s": 9}')
    assert prompt.params() == GenerationParams(temperature=0.5, stop=("a",))
    assert prompt.deadline_s == 9


def test_text_plain_keeps_text_with_braces_from_being_json() -> None:
    assert decode_prompt(b"{hello}", content_type="text/plain").prompt == "{hello}"


@pytest.mark.parametrize(
    ("payload", "code", "param"),
    [
        (b'{"prompt": "x", "foo": 1}', 400, "foo"),
        (b'{"prompt": "x", "max_tokens": 0}', 400, "max_tokens"),
        (b'{"prompt": "x", "max_tokens": "5"}', 400, "max_tokens"),
        (b'{"prompt": "x", "messages": []}', 400, "prompt"),
        (b"{}", 400, "prompt"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', 400, "messages"),
        (b'{"prompt": "x", "id": ""}', 400, "id"),
        (b'{"prompt": "x", "deadline_s": -1}', 400, "deadline_s"),
        (b'{"prompt": "\xff"}', 400, None),
        (b'{"prompt": NaN}', 400, None),
        (b"\x00\xff", 400, None),
        (b"   ", 400, "prompt"),
        (b'{"prompt":' + b"[" * 30_000, 400, "prompt"),
        (b'"' + b"x" * MAX_MESSAGE_BYTES + b'"', 413, None),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_bad_prompts_are_refused(payload: bytes, code: int, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        decode_prompt(payload)
    assert (caught.value.code, caught.value.param) == (code, param)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
FIELDS = st.sampled_from(["id", "prompt", "messages", "stop", "logit_bias", "reply_to", "command", "package", "type"])


@pytest.mark.parametrize("kind", sorted(DECODERS))
@given(payload=st.binary(max_size=300) | st.dictionaries(FIELDS, JSON).map(lambda tree: json.dumps(tree).encode()))
def test_nothing_but_a_request_error_comes_of_hostile_bytes(kind: str, payload: bytes) -> None:
    try:
        DECODERS[kind](payload)
    except RequestError as error:
        if error.code not in {400, 413}:
            raise


def test_a_cancel_is_an_object_or_a_bare_id() -> None:
    assert decode_cancel(b" abc \n") == decode_cancel(b'{"id": "abc"}') == CancelMessage(id="abc")


def test_a_message_of_a_newer_agent_is_read_with_what_is_known() -> None:
    data = b'{"state": "online", "boot": 1, "connection": 1, "agent": "9", "something": {"new": true}}'
    assert decode_from_device(data, StatusMessage).agent == "9"


@pytest.mark.parametrize("text", ["é" * 100_000, '"\\\n' * 40_000, "\x01" * 30_000], ids=["wide", "quotes", "control"])
def test_a_final_message_never_exceeds_the_limit(text: str) -> None:
    timings = Timings(
        queue_s=0, prefill_s=0, first_token_s=0, decode_s=0, prompt_tokens_per_s=0, generated_tokens_per_s=0
    )
    usage = Usage(prompt_tokens=1, cached_tokens=0, generated_tokens=1)
    final = FinalReply(
        id="x", seq=1, text=text, finish_reason="stop", usage=usage, timings=timings, model="m/1", device="d"
    )
    data = encode_final(final)
    assert len(data) <= MAX_MESSAGE_BYTES
    decoded = decode_reply(data)
    assert isinstance(decoded, FinalReply)
    assert decoded.truncated
    assert text.startswith(decoded.text)
    assert len(decoded.text) > 5_000


@pytest.mark.parametrize(
    ("error", "code", "reason", "worth_a_retry"),
    [
        (RequestError("busy", code=429, retry_after_s=1.0), 429, "request", True),
        (WorkerError("lost"), 503, "worker_lost", True),
        (EngineError("broken"), 500, "engine", False),
    ],
)
def test_errors_keep_code_and_reason(error: LamplighterError, code: int, reason: str, worth_a_retry: bool) -> None:
    reply = error_reply(error, "id")
    assert (reply.code, reply.reason, reply.retry_after_s is not None) == (code, reason, worth_a_retry)


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "é", ".x", "-x", "x" * 65, "a\n"])
def test_a_name_that_is_no_topic_level_is_refused(name: str) -> None:
    with pytest.raises(RequestError):
        Topics("lamplighter/v1", name)
    with pytest.raises(RequestError):
        Topics("lamplighter/v1", "box").group_prompt(name)


def test_topics_of_a_device_are_parsed_back() -> None:
    assert parse_device_topic("a/b", Topics("a/b", "box.1").device("status")) == ("box.1", "status")
    for other in ("a/device/x/status", "a/b/device/x", "a/b/device/x/y/z", "a/b/group/x/prompt", "a/b/device/+/status"):
        assert parse_device_topic("a/b", other) is None
