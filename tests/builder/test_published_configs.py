"""The fields of published models' ``config.json`` that decide about the graph, as they are spelled there."""

from __future__ import annotations

import pytest

from lamplighter_builder.fields import Fields
from lamplighter_builder.models.decoder import DecoderConfig
from lamplighter_builder.registry import find_architecture

Config = dict[str, object]


def config(model_type: str, act: str, sizes: tuple[int, int, int, int, int, int, int], **more: object) -> Config:
    """Return a config; sizes: hidden, intermediate, layers, heads, key-value heads, vocabulary, context."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    return {"model_type": model_type, "hidden_act": act, **dict(zip(names, sizes, strict=True)), **more}


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
MSCALES = {"short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122}
PHI_LONG = {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}

PUBLISHED: dict[str, Config] = {
    "Llama-3.2-1B": config(
        "llama",
        "silu",
        (2048, 8192, 16, 32, 8, 128256, 131072),
        head_dim=64,
        rms_norm_eps=1e-05,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
    ),
    "Mistral-7B-v0.1": config(
        "mistral",
        "silu",
        (4096, 14336, 32, 32, 8, 32000, 32768),
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.3": config(
        "mistral",
        "silu",
        (4096, 14336, 32, 32, 8, 32768, 32768),
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-0.5B": config(
        "qwen2",
        "silu",
        (896, 4864, 24, 14, 2, 151936, 32768),
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        max_window_layers=24,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": config(
        "qwen3",
        "silu",
        (1024, 3072, 28, 16, 8, 151936, 40960),
        head_dim=128,
        rms_norm_eps=1e-06,
        rope_theta=1000000,
        rope_scaling=None,
        sliding_window=None,
        max_window_layers=28,
        use_sliding_window=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "gemma-2b": config(
        "gemma", "gelu", (2048, 16384, 18, 8, 1, 256000, 8192), head_dim=256, rms_norm_eps=1e-06, hidden_activation=None
    ),
    "gemma-2-2b": config(
        "gemma2",
        "gelu_pytorch_tanh",
        (2304, 9216, 26, 8, 4, 256000, 8192),
        head_dim=256,
        rms_norm_eps=1e-06,
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        rope_theta=10000.0,
        sliding_window=4096,
    ),
    "gemma-3-1b": config(
        "gemma3_text",
        "unused",
        (1152, 6912, 26, 4, 1, 262144, 32768),
        head_dim=256,
        rms_norm_eps=1e-06,
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
    "phi-2": config(
        "phi",
        "gelu_new",
        (2560, 10240, 32, 32, 32, 51200, 2048),
        layer_norm_eps=1e-05,
        partial_rotary_factor=0.4,
        qk_layernorm=False,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    "Phi-3-mini-4k": config(
        "phi3", "silu", (3072, 8192, 32, 32, 32, 32064, 4096), **PHI_LONG, rope_scaling=None, sliding_window=2047
    ),
    "Phi-3.5-mini": config(
        "phi3", "silu", (3072, 8192, 32, 32, 32, 32064, 131072), **PHI_LONG, rope_scaling=LONG, sliding_window=262144
    ),
    "Phi-4-mini": config(
        "phi3",
        "silu",
        (3072, 8192, 32, 24, 8, 200064, 131072),
        **PHI_LONG,
        rope_scaling=LONG,
        sliding_window=262144,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
    "SmolLM3-3B": config(
        "smollm3",
        "silu",
        (2048, 11008, 36, 16, 4, 128256, 65536),
        rms_norm_eps=1e-06,
        rope_theta=5000000.0,
        rope_scaling=None,
        no_rope_layers=[1, 1, 1, 0] * 9,
        no_rope_layer_interval=4,
        layer_types=["full_attention"] * 36,
        use_sliding_window=False,
        sliding_window=None,
        attention_bias=False,
        mlp_bias=False,
    ),
    "Phi-3.5-MoE": config(
        "phimoe",
        "silu",
        (4096, 6400, 32, 32, 8, 32064, 131072),
        **PHI_LONG,
        rope_scaling={
            **LONG,
            **MSCALES,
            "short_factor": [1.0] * 64,
            "long_factor": [1.5] * 64,
            "original_max_position_embeddings": 4096,
        },
        attention_bias=True,
        lm_head_bias=True,
        num_experts_per_tok=2,
        num_local_experts=16,
        router_jitter_noise=0.01,
        sliding_window=131072,
    ),
}


def read(name: str) -> DecoderConfig:
    values = PUBLISHED[name]
    found = find_architecture(str(values["model_type"])).read_config(Fields(values, name))
    assert isinstance(found, DecoderConfig)
    return found


@pytest.mark.parametrize(
    ("name", "head_dim", "rope_type", "rotary_dim", "tied"),
    [
        ("Llama-3.2-1B", 64, "llama3", 64, True),
        ("Mistral-7B-v0.1", 128, "default", 128, False),
        ("Qwen2.5-0.5B", 64, "default", 64, True),
        ("Qwen3-0.6B", 128, "default", 128, True),
        ("gemma-2b", 256, "default", 256, True),
        ("gemma-2-2b", 256, "default", 256, True),
        ("gemma-3-1b", 256, "default", 256, True),
        ("phi-2", 80, "default", 32, False),
        ("Phi-3-mini-4k", 96, "default", 96, False),
        ("Phi-3.5-mini", 96, "longrope", 96, False),
        ("Phi-4-mini", 128, "longrope", 96, True),
        ("SmolLM3-3B", 128, "default", 128, True),
        ("Phi-3.5-MoE", 128, "longrope", 128, False),
    ],
)
def test_heads_rope_and_embeddings(name: str, head_dim: int, rope_type: str, rotary_dim: int, tied: bool) -> None:
    found = read(name)
    assert (found.head_dim, found.rope.rope_type, found.rope.rotary_dim) == (head_dim, rope_type, rotary_dim)
    assert found.tie_word_embeddings == tied


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("Mistral-7B-v0.1", [4096, 4096, 4096, 4096, 4096, 4096]),
        ("Mistral-7B-v0.3", [None] * 6),
        ("Qwen2.5-0.5B", [None] * 6),
        ("gemma-2-2b", [4096, None, 4096, None, 4096, None]),
        ("gemma-3-1b", [512, 512, 512, 512, 512, None]),
        ("Phi-3-mini-4k", [2047] * 6),
    ],
)
def test_windows_of_the_first_layers(name: str, windows: list[int | None]) -> None:
    found = read(name)
    assert [found.window(index) for index in range(6)] == windows


def test_every_fourth_layer_of_smollm3_is_not_rotated() -> None:
    found = read("SmolLM3-3B")
    assert found.facts(0).unrotated_layers == tuple(range(3, 36, 4))
    without = {key: value for key, value in PUBLISHED["SmolLM3-3B"].items() if key != "no_rope_layers"}
    assert find_architecture("smollm3").read_config(Fields(without, "SmolLM3-3B")) == found


def test_bases_of_the_two_ropes_of_gemma3() -> None:
    values = PUBLISHED["gemma-3-1b"]
    found = find_architecture("gemma3_text").read_config(Fields(values, "gemma-3-1b"))
    assert (found.rope.theta, found.local_rope.theta, found.attention_scale) == (1e6, 1e4, 1 / 16)


@pytest.mark.parametrize("name", ["Phi-3.5-mini", "Phi-4-mini"])
def test_long_rope_scales_cos_and_sin_by_the_ratio_of_the_contexts(name: str) -> None:
    rope = read(name).rope
    cos, _ = rope.tables(8192)
    # sqrt(1 + log(131072 / 4096) / log(4096)): cos(0) times the factor opens both sets.
    assert cos[0, 0] == pytest.approx(1.1902380714238083)
    assert cos[4096, 0] == cos[0, 0]
    assert cos.shape == (4096 + 8192, 48)
