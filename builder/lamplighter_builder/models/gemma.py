"""``gemma``: Gemma 1 and 1.1. The base decoder with these differences.

- Hidden states start as the embedding times ``sqrt(hidden_size)``.
- Norms store the difference of each factor to one.
- The activation is GELU with tanh, which early configs write as ``gelu``; ``hidden_act`` goes before the younger
  ``hidden_activation``.
- ``head_dim`` is a field of its own; embeddings are tied where the config does not say.
"""

from __future__ import annotations

import math

import numpy as np

from lamplighter_builder.components.embedding import Embedding
from lamplighter_builder.components.mlp import Activation, read_activation
from lamplighter_builder.components.norm import Norm, OffsetRMSNorm
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, Value
from lamplighter_builder.models.common import read_sizes, refuse
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``GemmaForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or attention are not supported.
    """
    refuse(config, "use_bidirectional_attention")
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", default=False)
    return DecoderConfig(
        **sizes,
        model_type="gemma",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=_read_first_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=True),
        attention_bias=bias,
        attention_output_bias=bias,
    )


def read_gemma_activation(config: Fields) -> Activation:
    """Read ``hidden_activation`` or the older ``hidden_act``, whose ``gelu`` means the tanh approximation.

    Raises:
        CheckpointError: If both are missing.
        UnsupportedModelError: If it is not supported.
    """
    if config.has("hidden_activation"):
        return read_activation(config, "hidden_activation")
    return read_activation(config, gelu="gelu_pytorch_tanh")


def _read_first_activation(config: Fields) -> Activation:
    """Read ``hidden_act``, all that transformers reads for Gemma 1, or ``hidden_activation`` where it is missing.

    Raises:
        CheckpointError: If both are missing.
        UnsupportedModelError: If it is not supported.
    """
    if not config.has("hidden_act"):
        return read_gemma_activation(config)
    return read_activation(config, gelu="gelu_pytorch_tanh")


class Gemma(CausalLM):
    """The decoder with scaled embedding and offset norms."""

    def embed(self, graph: Graph, embedding: Embedding, token_ids: Value) -> Value:
        """From token ids [B, S] to the first hidden states [B, S, hidden_size]."""
        scale = graph.constant(np.array(math.sqrt(self.config.hidden_size), dtype=np.float32))
        (scaled,) = graph.op("Mul", [embedding.lookup(graph, token_ids), scale])
        return scaled

    def make_norm(self, name: str) -> Norm:
        """Return a norm over the hidden states."""
        return OffsetRMSNorm(name, self.config.hidden_size, self.config.norm_epsilon)


ARCHITECTURE = Architecture(read_config, Gemma)
