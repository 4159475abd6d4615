from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import ConfigError, RequestError
from lamplighter_agent.package.manifest import GenerationDefaults


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 101.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", 21),
        ("typical_p", 0.0),
        ("xtc_probability", 1.1),
        ("xtc_threshold", 0.51),
        ("no_repeat_ngram_size", 65),
        ("dry_multiplier", -1.0),
        ("dry_base", 0.9),
        ("dry_allowed_length", 0),
        ("dry_sequence_breakers", ("",)),
        ("banned_words", ("x" * 257,)),
        ("forced_words", ("x",) * 257),
        ("forced_prefix", "x" * 16_385),
        ("n", 0),
        ("num_beams", 65),
        ("length_penalty", 11.0),
        ("deadline_s", math.inf),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(param: str, value: object) -> None:
    params = msgspec.structs.replace(GenerationParams(), **{param: value})
    with pytest.raises(RequestError, match=param.split("_")[0]) as caught:
        params.validate()
    assert caught.value.param == param


def test_min_tokens_beyond_max_tokens_are_contradictory() -> None:
    with pytest.raises(RequestError, match="min_tokens 5 is larger than max_tokens 4") as caught:
        GenerationParams(min_tokens=5, max_tokens=4).validate()
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": 0.0, "xtc_probability": 0.5}, "xtc_probability", "temperature 0 takes the top choice"),
        ({"forced_words": ("a",), "stop": ("b",)}, "forced_words", "give only one of them"),
        ({"forced_words": ("abc",), "banned_words": ("b",)}, "forced_words", "banned_words has 'b'"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "exclude each other"),
        ({"guided_regex": "a", "forced_words": ("a",)}, "forced_words", "the grammar decides"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "ends with the grammar"),
        ({"guided_grammar": "a" * 32_769}, "guided_grammar", "32769 characters, but may have 32768"),
        ({"num_beams": 2, "n": 3}, "n", "must be 1 to num_beams, 2"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature", "beams are not sampled"),
        ({"num_beams": 2, "top_p": 0.5}, "top_p", "beams are not sampled"),
        ({"length_penalty": 1.0}, "length_penalty", "set num_beams to 2 or more"),
        ({"early_stopping": True}, "early_stopping", "set num_beams to 2 or more"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    options: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        msgspec.structs.replace(GenerationParams(), **options).validate()
    assert caught.value.param == param


def test_limits_themselves_are_accepted() -> None:
    params = GenerationParams(
        max_tokens=1, temperature=0, top_k=0, top_p=1.0, min_p=0.0, seed=2**63 - 1, logprobs=20, stop=("x" * 1024,) * 16
    )
    params.validate()
    assert msgspec.json.decode(msgspec.json.encode(params), type=GenerationParams) == params


@pytest.mark.parametrize("params", [GenerationParams(stop_token_ids=(9,)), GenerationParams(logit_bias={9: 1.0})])
def test_token_ids_must_be_in_the_vocabulary(params: GenerationParams) -> None:
    params.check_vocabulary(10)
    with pytest.raises(RequestError, match="token 9, but the vocabulary has 9 tokens"):
        params.check_vocabulary(9)


def test_the_package_fills_what_the_request_leaves_open() -> None:
    defaults = GenerationDefaults(eos_token_ids=(0,), do_sample=True, temperature=0.6, top_k=20, top_p=0.9)
    params = GenerationParams(top_k=5).with_defaults(defaults)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.6, 5, 0.9, 1.0)


def test_a_package_that_does_not_sample_is_greedy() -> None:
    assert GenerationParams().with_defaults(GenerationDefaults(eos_token_ids=(0,), temperature=0.6)).temperature == 0.0


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.json.decode(b'{"temprature": 1.0}', type=GenerationParams)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("memory_budget_bytes", 0),
        ("max_context_tokens", 15),
        ("slots", 65),
        ("threads", 0),
        ("prefill_chunk_tokens", 0),
    ],
)
def test_an_engine_option_out_of_range_is_refused_by_name(option: str, value: int) -> None:
    options = msgspec.structs.replace(EngineOptions(), **{option: value})
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        options.validate()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": "END"}, "stop"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"on_context_full": "wrap"}, "on_context_full"),
    ],
)
def test_an_option_of_another_type_is_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=f"{param} is not of its type: ") as caught:
        GenerationParams(**options).validate()
    assert (caught.value.code, caught.value.param) == (400, param)
