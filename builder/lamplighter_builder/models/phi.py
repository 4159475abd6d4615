"""``phi``: Phi-1, Phi-1.5, Phi-2. These differences from the base decoder.

- One LayerNorm with bias a layer, before attention and MLP, which run side by side on the same normed states.
- Two-layer MLP ``fc1``, ``fc2``; biases everywhere, in the head too.
- Rope covers the first ``partial_rotary_factor`` of each head, 0.5 where it is missing.
- The output projection is called ``dense``, the last norm ``final_layernorm``.
- With ``qk_layernorm`` each head of query and key has a LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamplighter_builder.components.attention import Attention, LayerCache, NormedAttention
from lamplighter_builder.components.mlp import MLP, PlainMLP, read_activation
from lamplighter_builder.components.norm import LayerNorm, Norm, Stream
from lamplighter_builder.components.rope import read_partial_rotary_dim, read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph
from lamplighter_builder.models.common import read_sizes
from lamplighter_builder.models.decoder import Architecture, CausalLM, Context, DecoderConfig, Layer, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiConfig(DecoderConfig):
    """``qk_layernorm`` is True if heads of query and key are normed."""

    qk_layernorm: bool


def read_config(config: Fields) -> PhiConfig:
    """Read a ``config.json`` of ``PhiForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation or rope type are not supported.
    """
    sizes = read_sizes(config)
    return PhiConfig(
        **sizes,
        model_type="phi",
        norm_epsilon=config.positive("layer_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, read_partial_rotary_dim(config, sizes["head_dim"], default=0.5)),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=True,
        attention_output_bias=True,
        head_bias=True,
        qk_layernorm=config.flag("qk_layernorm", default=False),
    )


class PhiAttention(Attention):
    """Attention with the output projection under another name."""

    output_module: ClassVar[str] = "dense"


class NormedPhiAttention(NormedAttention):
    """The same with normed heads."""

    output_module: ClassVar[str] = "dense"


class ParallelLayer:
    """Attention and MLP on the same normed states, both added to the residual stream."""

    def __init__(self, input_norm: Norm, attention: Attention, mlp: MLP) -> None:
        self._input_norm, self._attention, self._mlp = input_norm, attention, mlp

    def __call__(self, graph: Graph, stream: Stream, context: Context, past: LayerCache) -> tuple[Stream, LayerCache]:
        """Run the layer on a stream of [B, S, hidden_size]; return the stream and the cache after it."""
        with graph.scope("input_layernorm"):
            normed, residual = self._input_norm(graph, stream)
        with graph.scope("self_attn"):
            attended, present = self._attention(graph, normed, context.lengths, context.rope, past)
        with graph.scope("mlp"):
            (delta,) = graph.op("Add", [attended, self._mlp(graph, normed)])
        return Stream(residual, delta), present


class Phi(CausalLM):
    """The decoder with parallel layers."""

    config: PhiConfig
    final_norm: ClassVar[str] = "model.final_layernorm"

    def __init__(self, config: PhiConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config

    def make_norm(self, name: str) -> Norm:
        """Return a norm over the hidden states."""
        return LayerNorm(name, self.config.hidden_size, self.config.norm_epsilon)

    def make_layer(self, index: int) -> Layer:
        """Return layer ``index``."""
        name = f"model.layers.{index}"
        return ParallelLayer(
            self.make_norm(f"{name}.input_layernorm"),
            self.make_attention(f"{name}.self_attn", index),
            self.make_mlp(f"{name}.mlp"),
        )

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        config, shape = self.config, self.attention_shape(index)
        if not config.qk_layernorm:
            return PhiAttention(name, shape, self.parts.linear)
        norms = (LayerNorm(f"{name}.{part}_layernorm", config.head_dim, config.norm_epsilon) for part in "qk")
        return NormedPhiAttention(name, shape, self.parts.linear, *norms)

    def make_mlp(self, name: str) -> MLP:
        """Return a layer's MLP."""
        config = self.config
        return PlainMLP(name, config.hidden_size, config.intermediate_size, config.activation, self.parts.linear)


ARCHITECTURE = Architecture(read_config, Phi)
