"""``gemma2``: Gemma 2. ``gemma`` with these differences.

- Norms behind attention and MLP too, before their outputs are added to the residual stream.
- Attention scores and logits are bounded by ``cap * tanh(x / cap)``; scores are scaled by ``query_pre_attn_scalar``.
- Layers alternate between a window and the whole text, or as ``layer_types`` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lamplighter_builder.components.attention import Attention, AttentionShape, LayerCache
from lamplighter_builder.components.embedding import Embedding
from lamplighter_builder.components.mlp import MLP
from lamplighter_builder.components.norm import Norm, Stream
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, Value
from lamplighter_builder.models.common import read_sizes, read_sliding_layers, read_window, refuse
from lamplighter_builder.models.decoder import Architecture, Context, DecoderConfig, Layer, Parts
from lamplighter_builder.models.gemma import Gemma, read_gemma_activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    """Bounds of attention scores and logits, None for none."""

    attention_softcap: float | None
    logits_softcap: float | None


def read_config(config: Fields) -> Gemma2Config:
    """Read a ``config.json`` of ``Gemma2ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type, attention or a layer type are not supported.
    """
    refuse(config, "use_bidirectional_attention")
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", default=False)
    window = read_window(config, default=4096)
    alternating = [
        "full_attention" if index % 2 else "sliding_attention" for index in range(sizes["num_hidden_layers"])
    ]
    return Gemma2Config(
        **sizes,
        model_type="gemma2",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_gemma_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=True),
        attention_bias=bias,
        attention_output_bias=bias,
        sliding_window=window,
        sliding_layers=None if window is None else read_sliding_layers(config, alternating),
        attention_scale=config.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=read_softcap(config, "attn_logit_softcapping"),
        logits_softcap=read_softcap(config, "final_logit_softcapping"),
    )


def read_softcap(config: Fields, key: str) -> float | None:
    """Read a bound; None where it is missing or null.

    Raises:
        CheckpointError: If it is no number.
    """
    return config.number(key) if config.has(key) else None


def softcap(graph: Graph, x: Value, cap: float) -> Value:
    """Return ``cap * tanh(x / cap)``."""
    limit = graph.constant(np.array(cap, dtype=np.float32))
    (scaled,) = graph.op("Div", [x, limit])
    (bounded,) = graph.op("Tanh", [scaled])
    (result,) = graph.op("Mul", [bounded, limit])
    return result


class SandwichLayer:
    """Attention and MLP, each between two norms, added to the residual stream.

    Args:
        norms: Before and behind attention, before and behind the MLP.
        attention: Self-attention.
        mlp: Feed-forward block.
    """

    def __init__(self, norms: tuple[Norm, Norm, Norm, Norm], attention: Attention, mlp: MLP) -> None:
        self._norms, self._attention, self._mlp = norms, attention, mlp

    def __call__(self, graph: Graph, stream: Stream, context: Context, past: LayerCache) -> tuple[Stream, LayerCache]:
        """Run the layer on a stream of [B, S, hidden_size]; return the stream and the cache after it."""
        before_attention, behind_attention, before_mlp, behind_mlp = self._norms
        with graph.scope("input_layernorm"):
            normed, residual = before_attention(graph, stream)
        with graph.scope("self_attn"):
            attended, present = self._attention(graph, normed, context.lengths, context.rope, past)
        with graph.scope("post_attention_layernorm"):
            attended, _ = behind_attention(graph, Stream(attended))
        with graph.scope("pre_feedforward_layernorm"):
            normed, residual = before_mlp(graph, Stream(residual, attended))
        with graph.scope("mlp"):
            fed = self._mlp(graph, normed)
        with graph.scope("post_feedforward_layernorm"):
            fed, _ = behind_mlp(graph, Stream(fed))
        return Stream(residual, fed), present


class Gemma2(Gemma):
    """The decoder with sandwich layers and bounded scores and logits."""

    config: Gemma2Config

    def __init__(self, config: Gemma2Config, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config

    def make_layer(self, index: int) -> Layer:
        """Return layer ``index``."""
        name = f"model.layers.{index}"
        norms = (
            self.make_norm(f"{name}.input_layernorm"),
            self.make_norm(f"{name}.post_attention_layernorm"),
            self.make_norm(f"{name}.pre_feedforward_layernorm"),
            self.make_norm(f"{name}.post_feedforward_layernorm"),
        )
        return SandwichLayer(norms, self.make_attention(f"{name}.self_attn", index), self.make_mlp(f"{name}.mlp"))

    def attention_shape(self, index: int) -> AttentionShape:
        """Return sizes and options of the attention of layer ``index``."""
        return replace(super().attention_shape(index), softcap=self.config.attention_softcap)

    def emit_head(self, graph: Graph, embedding: Embedding, hidden: Value) -> Value:
        """From hidden states [B, n, hidden_size] to logits [B, n, vocab_size]."""
        logits, cap = super().emit_head(graph, embedding, hidden), self.config.logits_softcap
        return logits if cap is None else softcap(graph, logits, cap)


ARCHITECTURE = Architecture(read_config, Gemma2)
