"""GGUF architectures: how the names of their tensors and their metadata read in Hugging Face's words.

llama.cpp stores the query and key rows of ``llama`` interleaved for its rotary kernel, and the norms of the Gemma
families with one added; :class:`GgufArchitecture` says so, and ``gguf.py`` undoes both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from lamplighter_builder.fields import Fields
from lamplighter_builder.gguf_rope import read_rope_parameters

EXPERT: Final = "{expert}"
"""Stands in a module's name for the number of an expert; the tensor holds all of them."""

_Config = dict[str, object]

_PHIMOE_MSCALE: Final = 1.243163121016122
_PHIMOE_JITTER: Final = 0.01
"""Of the published model, Phi-3.5-MoE-instruct; GGUF files do not have them."""


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a config is made from.

    Attributes:
        architecture: ``general.architecture``, the prefix of the keys.
        metadata: All metadata.
        shapes: Shapes of all tensors by their names in the file.
        factors: Contents of the small tensors that scale the rotary frequencies, by name.
    """

    architecture: str
    metadata: Fields
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, tuple[float, ...]]

    def integer(self, key: str, *, default: int | None = None) -> int:
        """Return a whole number of the architecture's own metadata; see :meth:`Fields.integer`."""
        return self.metadata.integer(f"{self.architecture}.{key}", default=default)

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a number of the architecture's own metadata; see :meth:`Fields.number`."""
        return self.metadata.number(f"{self.architecture}.{key}", default=default)

    def has(self, key: str) -> bool:
        """Tell whether the architecture's own metadata has a field."""
        return self.metadata.has(f"{self.architecture}.{key}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """One GGUF architecture.

    Attributes:
        modules: Hugging Face's module paths by tensor names, without ``.weight``.
        layer_modules: The same inside a layer. Several paths: their rows are stacked. ``EXPERT``: the first extent
            counts experts.
        config: Makes the fields of a ``config.json``.
        interleaved: True if the rows of ``q_proj`` and ``k_proj`` are interleaved.
        norm_offset: What was added to the weights of the norms.
    """

    modules: Mapping[str, str]
    layer_modules: Mapping[str, tuple[str, ...]]
    config: Callable[[GgufFacts], _Config]
    interleaved: bool = False
    norm_offset: float = 0.0


def _common(facts: GgufFacts, model_type: str, activation: str) -> _Config:
    hidden_size, heads = facts.integer("embedding_length"), facts.integer("attention.head_count")
    head_dim = facts.integer("attention.key_length", default=hidden_size // max(heads, 1))
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": facts.integer("feed_forward_length"),
        "num_hidden_layers": facts.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "vocab_size": facts.shapes.get("token_embd.weight", (0,))[0],
        "max_position_embeddings": facts.integer("context_length"),
        "hidden_act": activation,
        "rope_parameters": read_rope_parameters(
            facts.metadata, facts.architecture, facts.factors, facts.integer("rope.dimension_count", default=head_dim)
        ),
        "tie_word_embeddings": "output.weight" not in facts.shapes,
    }


def _rms(facts: GgufFacts, model_type: str, activation: str = "silu") -> _Config:
    epsilon = facts.number("attention.layer_norm_rms_epsilon")
    return _common(facts, model_type, activation) | {"rms_norm_eps": epsilon}


def _llama(facts: GgufFacts) -> _Config:
    return _rms(facts, "llama") | {
        "attention_bias": "blk.0.attn_q.bias" in facts.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in facts.shapes,
    }


def _qwen2(facts: GgufFacts) -> _Config:
    return _rms(facts, "qwen2") | {"use_sliding_window": False}


def _qwen3(facts: GgufFacts) -> _Config:
    return _rms(facts, "qwen3") | {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in facts.shapes}


def _partial_rotary(facts: GgufFacts, config: _Config) -> _Config:
    """Add ``partial_rotary_factor`` to the rope parameters."""
    head_dim = facts.integer("embedding_length") // max(facts.integer("attention.head_count"), 1)
    head_dim = facts.integer("attention.key_length", default=head_dim)
    share = facts.integer("rope.dimension_count", default=head_dim) / max(head_dim, 1)
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    return config | {"rope_parameters": rope | {"partial_rotary_factor": share}, "partial_rotary_factor": share}


def _phi(facts: GgufFacts) -> _Config:
    config = _common(facts, "phi", "gelu_new")
    config |= {"layer_norm_eps": facts.number("attention.layer_norm_epsilon"), "qk_layernorm": False}
    return _partial_rotary(facts, config)


def _with_windows(facts: GgufFacts, config: _Config) -> _Config:
    """Add the window, which llama.cpp writes as 0 where there is none, and the context before scaling."""
    window = facts.integer("attention.sliding_window", default=0)
    original = facts.integer("rope.scaling.original_context_length", default=facts.integer("context_length"))
    return config | {"sliding_window": window or None, "original_max_position_embeddings": original}


def _phi3(facts: GgufFacts) -> _Config:
    return _partial_rotary(facts, _with_windows(facts, _rms(facts, "phi3")))


def _phimoe(facts: GgufFacts) -> _Config:
    config = _with_windows(facts, _rms(facts, "phimoe"))
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    if rope["rope_type"] == "longrope":
        rope = rope | {"short_mscale": _PHIMOE_MSCALE, "long_mscale": _PHIMOE_MSCALE}
    return config | {
        "rope_parameters": rope,
        "num_local_experts": facts.integer("expert_count"),
        "num_experts_per_tok": facts.integer("expert_used_count"),
        "attention_bias": "blk.0.attn_q.bias" in facts.shapes,
        "lm_head_bias": "output.bias" in facts.shapes,
        "router_jitter_noise": _PHIMOE_JITTER,
    }


def _gemma(facts: GgufFacts) -> _Config:
    return _rms(facts, "gemma", "gelu_pytorch_tanh")


def _query_scale(facts: GgufFacts, layers_of_27b: int) -> int:
    """Return ``query_pre_attn_scalar``: not in the metadata; llama.cpp too knows the 27B models by their layers."""
    if facts.integer("block_count") == layers_of_27b:
        return facts.integer("embedding_length") // facts.integer("attention.head_count")
    return facts.integer("attention.key_length")


def _gemma2(facts: GgufFacts) -> _Config:
    layers = facts.integer("block_count")
    return _rms(facts, "gemma2", "gelu_pytorch_tanh") | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": facts.number("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": facts.number("final_logit_softcapping", default=30.0),
        "sliding_window": facts.integer("attention.sliding_window", default=4096),
        "query_pre_attn_scalar": _query_scale(facts, 46),
        "layer_types": ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)],
    }


def _gemma3(facts: GgufFacts) -> _Config:
    layers = facts.integer("block_count")
    period = facts.integer("attention.sliding_window_pattern", default=6)
    config = _rms(facts, "gemma3_text", "gelu_pytorch_tanh")
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": facts.number("final_logit_softcapping", default=0.0) or None,
        "sliding_window": facts.integer("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scale(facts, 62),
        "layer_types": ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(layers)],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": facts.number("rope.freq_base_swa", default=10000.0),
            },
        },
    }


_MODULES: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION: Final = {
    "attn_norm": ("input_layernorm",),
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_output": ("self_attn.o_proj",),
}
_GATED_MLP: Final = {"ffn_gate": ("mlp.gate_proj",), "ffn_up": ("mlp.up_proj",), "ffn_down": ("mlp.down_proj",)}
_LLAMA: Final = _ATTENTION | _GATED_MLP | {"ffn_norm": ("post_attention_layernorm",)}
_HEAD_NORMS: Final = {"attn_q_norm": ("self_attn.q_norm",), "attn_k_norm": ("self_attn.k_norm",)}
_GEMMA2: Final = (
    _ATTENTION
    | _GATED_MLP
    | {
        "post_attention_norm": ("post_attention_layernorm",),
        "ffn_norm": ("pre_feedforward_layernorm",),
        "post_ffw_norm": ("post_feedforward_layernorm",),
    }
)
_PHI: Final = _ATTENTION | {
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.dense",),
    "ffn_up": ("mlp.fc1",),
    "ffn_down": ("mlp.fc2",),
}
_PHI3: Final = {
    "attn_norm": ("input_layernorm",),
    "attn_qkv": ("self_attn.qkv_proj",),
    "attn_output": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_up": ("mlp.gate_up_proj",),
    "ffn_down": ("mlp.down_proj",),
}
_EXPERTS: Final = {
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_gate_inp": ("block_sparse_moe.gate",),
    "ffn_gate_exps": (f"block_sparse_moe.experts.{EXPERT}.w1",),
    "ffn_down_exps": (f"block_sparse_moe.experts.{EXPERT}.w2",),
    "ffn_up_exps": (f"block_sparse_moe.experts.{EXPERT}.w3",),
}

GGUF_ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = MappingProxyType(
    {
        "llama": GgufArchitecture(modules=_MODULES, layer_modules=_LLAMA, config=_llama, interleaved=True),
        "qwen2": GgufArchitecture(modules=_MODULES, layer_modules=_LLAMA, config=_qwen2),
        "qwen3": GgufArchitecture(modules=_MODULES, layer_modules=_LLAMA | _HEAD_NORMS, config=_qwen3),
        "phi2": GgufArchitecture(
            modules=_MODULES | {"output_norm": "model.final_layernorm"}, layer_modules=_PHI, config=_phi
        ),
        "phi3": GgufArchitecture(modules=_MODULES, layer_modules=_PHI3, config=_phi3),
        "phimoe": GgufArchitecture(modules=_MODULES, layer_modules=_ATTENTION | _EXPERTS, config=_phimoe),
        "gemma": GgufArchitecture(modules=_MODULES, layer_modules=_LLAMA, config=_gemma, norm_offset=1.0),
        "gemma2": GgufArchitecture(modules=_MODULES, layer_modules=_GEMMA2, config=_gemma2, norm_offset=1.0),
        "gemma3": GgufArchitecture(
            modules=_MODULES, layer_modules=_GEMMA2 | _HEAD_NORMS, config=_gemma3, norm_offset=1.0
        ),
    }
)
"""By ``general.architecture``. Mistral is stored as ``llama``."""
