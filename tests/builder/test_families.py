from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import BuildError, CheckpointError, UnsupportedModelError, WeightMismatchError
from lamplighter_agent.package.manifest import Manifest, read_manifest
from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.fields import Fields
from lamplighter_builder.precision import float_parts
from lamplighter_builder.registry import MODEL_MODULES, find_architecture
from support.families import FAMILIES, LONG_ROPE_SWITCH, WINDOW, load_reference, write_family_checkpoint
from support.tiny_model import build_tiny_package, save_checkpoint


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    """The ``config.json`` that transformers writes for a family."""
    root = tmp_path_factory.mktemp("configs")

    def read(family: str) -> dict[str, object]:
        if not (root / family).exists():
            write_family_checkpoint(root / family, family)
        config = json.loads((root / family / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config

    return read


def read_architecture(config: dict[str, object]) -> None:
    model_type = config["model_type"]
    assert isinstance(model_type, str)
    find_architecture(model_type).read_config(Fields(config, "config.json"))


def test_every_row_of_the_registry_has_a_tiny_family() -> None:
    assert {options["model_type"] for options in FAMILIES.values()} == set(MODEL_MODULES)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'mamba' is not supported") as caught:
        find_architecture("mamba")
    assert "gemma3_text" in str(caught.value.hint)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rope_parameters": {"rope_type": "spiral"}}, UnsupportedModelError, "rope type 'spiral'"),
        (
            {"hidden_act": "mish", "hidden_activation": "mish"},
            UnsupportedModelError,
            r"config.json: hidden_act(ivation)?: activation 'mish'",
        ),
        ({"intermediate_size": None}, CheckpointError, "'intermediate_size' is missing"),
        ({"num_attention_heads": "four"}, CheckpointError, "num_attention_heads is 'four'"),
    ],
)
def test_what_is_not_known_stops_the_build(
    family: str,
    changes: dict[str, object],
    error: type[BuildError],
    words: str,
    configs: Callable[[str], dict[str, object]],
) -> None:
    config = configs(family)
    if family == "gemma3_text" and "rope_parameters" in changes:
        changes = {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}}
    with pytest.raises(error, match=words):
        read_architecture(config | changes)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer type 'chunked_attention'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ],
)
def test_unsupported_options_of_a_family_stop_the_build(
    family: str, changes: dict[str, object], words: str, configs: Callable[[str], dict[str, object]]
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_architecture(configs(family) | changes)


def test_factors_of_another_length_are_refused(configs: Callable[[str], dict[str, object]]) -> None:
    config = configs("phi3-longrope")
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    with pytest.raises(CheckpointError, match="long_factor has 3 values, but must have 8"):
        read_architecture(config | {"rope_parameters": rope | {"long_factor": [1.0, 2.0, 3.0]}})


@pytest.mark.parametrize("rotated", [[1, 0, 1], [1, 0, 1, 2], [1, 0, 1, 0.5]])
def test_layers_that_do_not_say_whether_they_rotate_are_refused(
    rotated: list[float], configs: Callable[[str], dict[str, object]]
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no_rope_layers must have 0 or 1 for each of 4 layers"):
        read_architecture(configs("smollm3") | {"no_rope_layers": rotated})


def test_heads_that_the_operator_does_not_take_are_refused(configs: Callable[[str], dict[str, object]]) -> None:
    config = Fields(configs("qwen3") | {"head_dim": 100}, "config.json")
    with pytest.raises(UnsupportedModelError, match="heads of 100 features are not supported") as caught:
        find_architecture("qwen3").make(config, float_parts())
    assert "multiples of 8" in str(caught.value.hint)


@pytest.mark.parametrize("early_name", ["su", "yarn"])
def test_early_phi3_configs_are_read_like_new_ones(
    early_name: str, configs: Callable[[str], dict[str, object]]
) -> None:
    config = configs("phi3-longrope")
    rope = config.pop("rope_parameters")
    assert isinstance(rope, dict)
    architecture = find_architecture("phi3")
    new = architecture.read_config(Fields({**config, "rope_parameters": rope}, "new"))
    early = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": early_name, **{key: rope[key] for key in ("short_factor", "long_factor")}},
    }
    assert architecture.read_config(Fields(config | early, "early")).rope == new.rope


def test_early_gemma3_configs_are_read_like_new_ones(configs: Callable[[str], dict[str, object]]) -> None:
    config = configs("gemma3_text")
    architecture = find_architecture("gemma3_text")
    new = architecture.read_config(Fields(config, "new"))
    early = dict(config)
    del early["rope_parameters"], early["layer_types"]
    early |= {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    found = architecture.read_config(Fields(early, "early"))
    assert (found.rope, found.local_rope) == (new.rope, new.local_rope)
    assert found.sliding_layers == (0, 1, 3)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"hidden_act": "gelu", "hidden_activation": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "silu"),
        ({"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    ],
)
def test_the_activation_of_the_first_gemma_is_the_one_that_transformers_reads(
    fields: dict[str, object], found: str, configs: Callable[[str], dict[str, object]]
) -> None:
    config = find_architecture("gemma").read_config(Fields(configs("gemma") | fields, "config.json"))
    assert config.activation is read_activation(Fields({"act": found}, "act"), "act")


def test_missing_and_unused_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = write_family_checkpoint(tmp_path / "qwen3", "qwen3")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "qwen2"
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightMismatchError) as caught:
        build_tiny_package(checkpoint, tmp_path / "package")
    assert "model.layers.0.self_attn.q_proj.bias" in caught.value.missing
    assert "model.layers.1.self_attn.k_norm.weight" in caught.value.unused


def manifest_of(family: str, tmp_path: Path) -> Manifest:
    checkpoint = write_family_checkpoint(tmp_path / family, family)
    return read_manifest(build_tiny_package(checkpoint, tmp_path / "package"))


def test_manifest_describes_windows_of_alternating_layers(tmp_path: Path) -> None:
    model = manifest_of("gemma2", tmp_path).model
    assert (model.sliding_window, model.sliding_layers) == (WINDOW, (0, 2))


def test_manifest_describes_the_switch_of_long_rope(tmp_path: Path) -> None:
    rope = manifest_of("phi3-partial-longrope", tmp_path).model.rope
    assert rope is not None
    assert (rope.rope_type, rope.rotary_dim, rope.shiftable) == ("longrope", 16, False)
    assert rope.original_max_position_embeddings == LONG_ROPE_SWITCH


def test_manifest_describes_the_rope_of_windowed_layers(tmp_path: Path) -> None:
    model = manifest_of("gemma3_text", tmp_path).model
    assert model.rope is not None
    assert model.local_rope is not None
    assert (model.rope.rope_type, model.rope.rope_theta) == ("linear", 1e6)
    assert (model.local_rope.rope_type, model.local_rope.rope_theta) == ("default", 1e4)


@pytest.mark.parametrize(
    "family", ["llama", "llama-scaled", "llama-linear", "qwen2-yarn-windowed", "phi", "phi3-longrope", "phi3"]
)
def test_rotary_tables_are_those_of_transformers_far_out(family: str, tmp_path: Path) -> None:
    """Angles at position 8000 are rounded to 0.0005 radians; the models were trained with that rounding."""
    positions = 8192
    checkpoint = write_family_checkpoint(tmp_path / family, family)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = find_architecture(config["model_type"]).read_config(Fields(config, family)).rope
    cos, sin = rope.tables(positions)
    rotary = load_reference(checkpoint).model.model.rotary_emb
    expected = rotary(torch.zeros(1), torch.arange(positions)[None])
    # With LongRoPE the short factors come first; a text of this length has the long ones.
    for found, wanted in zip((cos[-positions:], sin[-positions:]), expected, strict=True):
        np.testing.assert_allclose(found, wanted[0, :, : rope.rotary_dim // 2].numpy(), atol=1e-4)


@pytest.mark.parametrize(("head_dim", "scales"), [(8, False), (16, True)])
def test_windowed_layers_of_narrow_heads_get_no_8_bit_cache(head_dim: int, scales: bool, tmp_path: Path) -> None:
    """The operator refuses them there, at the first step."""
    from transformers import MistralConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = MistralConfig(
        **sizes, num_key_value_heads=2, head_dim=head_dim, sliding_window=WINDOW, num_hidden_layers=1, vocab_size=384
    )
    package = build_tiny_package(save_checkpoint(tmp_path / "model", config, seed=1), tmp_path / "package")
    assert (read_manifest(package).cache_scales is not None) == scales
    options = EngineOptions(kv_cache_dtype="int8" if scales else None, max_context_tokens=128)
    with Engine.load(package, options=options) as engine:
        tokens = list(engine.generate("The lamp", GenerationParams(max_tokens=40, ignore_eos=True)))
    assert sum(token.token_id is not None for token in tokens) == 40
