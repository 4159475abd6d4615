"""One tiny random checkpoint of every family, written by transformers, small in all but what makes it that family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from lamplighter_builder.parity import Reference
from support.tiny_model import CHATML, save_checkpoint, tiny_tokenizer

Options = Mapping[str, object]

_SIZES: Final[Options] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
_DEFAULT_ROPE: Final[Options] = MappingProxyType({"rope_type": "default", "rope_theta": 10000.0})
_LONG_ROPE: Final[Options] = MappingProxyType(
    {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 17.0, 31.0],
    }
)

LONG_ROPE_SWITCH: Final = 64
"""Tokens up to which the tiny ``longrope`` families use their short factors."""

WINDOW: Final = 24
"""Tokens that the windowed layers of the tiny families see."""

FAMILIES: Final[Mapping[str, Options]] = MappingProxyType(
    {
        "llama": {"model_type": "llama", "rope_parameters": _DEFAULT_ROPE, "tie_word_embeddings": True},
        "llama-scaled": {
            "model_type": "llama",
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "llama-linear": {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        "llama-narrow-heads": {"model_type": "llama", "rope_parameters": _DEFAULT_ROPE, "head_dim": 8},
        "qwen2": {"model_type": "qwen2", "rope_parameters": _DEFAULT_ROPE, "tie_word_embeddings": True},
        "qwen2-yarn-windowed": {
            "model_type": "qwen2",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
        "mistral": {"model_type": "mistral", "rope_parameters": _DEFAULT_ROPE, "sliding_window": WINDOW},
        "mistral-unwindowed": {"model_type": "mistral", "rope_parameters": _DEFAULT_ROPE, "sliding_window": None},
        "ministral": {
            "model_type": "ministral",
            "rope_parameters": _DEFAULT_ROPE,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "gemma": {
            "model_type": "gemma",
            "rope_parameters": _DEFAULT_ROPE,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        "phi3": {"model_type": "phi3", "rope_parameters": _DEFAULT_ROPE, "sliding_window": WINDOW},
        "phi3-longrope": {
            "model_type": "phi3",
            "rope_parameters": _LONG_ROPE,
            "original_max_position_embeddings": LONG_ROPE_SWITCH,
        },
        "phi3-partial-longrope": {
            "model_type": "phi3",
            "tie_word_embeddings": True,
            "head_dim": 32,
            "hidden_size": 128,
            "rope_parameters": {**_LONG_ROPE, "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": LONG_ROPE_SWITCH,
        },
        "phi": {
            "model_type": "phi",
            "hidden_size": 128,
            "head_dim": 32,
            "num_key_value_heads": 4,
            "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
        },
        "phi-normed-heads": {
            "model_type": "phi",
            "hidden_size": 128,
            "head_dim": 32,
            "qk_layernorm": True,
            "tie_word_embeddings": True,
            "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
        },
        "qwen3": {"model_type": "qwen3", "rope_parameters": _DEFAULT_ROPE, "head_dim": 32},
        "smollm3": {
            "model_type": "smollm3",
            "rope_parameters": _DEFAULT_ROPE,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": True,
        },
        "smollm3-yarn-windowed": {
            "model_type": "smollm3",
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "gemma2": {
            "model_type": "gemma2",
            "rope_parameters": _DEFAULT_ROPE,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "sliding_window": WINDOW,
        },
        "gemma3_text": {
            "model_type": "gemma3_text",
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "phimoe": {
            "model_type": "phimoe",
            "num_local_experts": 6,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
            "rope_parameters": {**_LONG_ROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": LONG_ROPE_SWITCH,
        },
    }
)

WINDOWED: Final = (
    "qwen2-yarn-windowed",
    "mistral",
    "ministral",
    "phi3",
    "smollm3-yarn-windowed",
    "gemma2",
    "gemma3_text",
)
LONG_ROPE: Final = ("phi3-longrope", "phi3-partial-longrope", "phimoe")


def write_family_checkpoint(directory: Path, family: str, *, chat_template: str = CHATML) -> Path:
    """Write the tiny checkpoint of one of ``FAMILIES`` and return the directory."""
    from transformers import AutoConfig

    options = {**_SIZES, "vocab_size": tiny_tokenizer().get_vocab_size(), **FAMILIES[family]}
    config = AutoConfig.for_model(
        str(options.pop("model_type")), **{key: _plain(value) for key, value in options.items()}
    )
    return save_checkpoint(directory, config, seed=len(family), chat_template=chat_template)


def load_reference(checkpoint: Path) -> Reference:
    """Load a tiny checkpoint in transformers, with its ``phimoe`` put right.

    ``PhimoeRotaryEmbedding`` computes the length of the text, but then takes the frequencies without it (5.23), so that
    the long factors of LongRoPE are never used; earlier versions and the model's own code pass it.
    """
    reference = Reference.load(checkpoint)
    rotary = reference.model.model.rotary_emb
    if reference.model.config.model_type == "phimoe":
        plain, length = rotary.rope_init_fn, [0]

        def note_length(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
            length[0] = int(kwargs["position_ids"].max()) + 1

        rotary.register_forward_pre_hook(note_length, with_kwargs=True)
        rotary.rope_init_fn = lambda config: plain(config, seq_len=length[0])
    return reference


def _plain(value: object) -> object:
    """Return a copy that transformers may change."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
