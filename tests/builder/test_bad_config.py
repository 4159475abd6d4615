"""A damaged ``config.json`` of any family ends in an error that names the file and the field, and never in another."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import BuildError, CheckpointError
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph
from lamplighter_builder.precision import float_parts
from lamplighter_builder.registry import find_architecture
from support.families import FAMILIES, write_family_checkpoint

VALUES = [None, 0, -1, 1, 2**70, 1.5, 1e30, float("nan"), float("inf"), True, "x", [], [1], [None], {}, {"a": 1}]
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]


@functools.cache
def config_text(family: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        return (write_family_checkpoint(Path(directory), family) / "config.json").read_text()


def build_graph(config: dict[str, Any]) -> None:
    fields = Fields(config, "config.json")
    find_architecture(fields.text("model_type")).make(fields, float_parts()).build(Graph("x"))


@settings(max_examples=150, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), value=st.sampled_from(VALUES), data=st.data())
def test_any_field_of_any_value_is_built_or_refused_with_the_file_named(
    family: str, value: object, data: st.DataObject
) -> None:
    config = json.loads(config_text(family))
    owner = config
    key = data.draw(st.sampled_from(sorted(owner)))
    while isinstance(owner[key], dict) and data.draw(st.booleans()):
        owner = owner[key]
        key = data.draw(st.sampled_from(sorted(owner)))
    owner[key] = value
    error: str | None = None
    try:
        build_graph(config)
    except BuildError as caught:
        error = caught.message
    assert error is None or "config.json" in error or "model_type" in error or repr(value) in error


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "phimoe"])
@pytest.mark.parametrize("key", SIZES)
def test_size_that_is_missing_zero_or_absurd_is_refused_by_name(family: str, key: str) -> None:
    for value, words in ((None, "is missing"), (0, "is 0, but must be from 1"), (2**70, "but must be from 1 to")):
        config = json.loads(config_text(family)) | {key: value}
        with pytest.raises(CheckpointError) as caught:
            build_graph(config)
        assert f"config.json: {key}" in caught.value.message or f"the field '{key}' is missing" in caught.value.message
        assert words in caught.value.message
