"""The Llama-shaped base: pre-norm layers of grouped-query attention and a gated MLP, a final norm and a head.

Graph contract of every decoder:

====================================== ======= ============================================
input                                  dtype   shape
====================================== ======= ============================================
``input_ids``                          int64   [batch_size, sequence_length]
``attention_mask``                     int64   [batch_size, total_sequence_length]
``past_key_values.{i}.key|value``      float32 [batch_size, kv_heads, past, head_dim]
``logits_start`` (default 0)           int64   [1]
output
``logits``                             float32 [batch_size, logits_length, vocab_size]
``present.{i}.key|value``              float32 [batch_size, kv_heads, total, head_dim]
====================================== ======= ============================================

Rows of ``attention_mask`` are ones, then zeros. With B > 1, S must be 1 if there is a past. ``logits_start`` drops the
first positions before the head. A family overrides ``make_*`` methods in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.components.attention import (
    Attention,
    AttentionShape,
    CacheLengths,
    LayerCache,
    cache_lengths,
)
from lamplighter_builder.components.embedding import Embedding, EmbeddingFactory, EmbeddingSpec
from lamplighter_builder.components.linear import LinearFactory, LinearSpec, linear_source
from lamplighter_builder.components.mlp import Activation, GatedMLP
from lamplighter_builder.components.norm import RMSNorm, Stream
from lamplighter_builder.components.rope import Rope, RopeTables, declare_tables
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What every decoder of this shape has, in Hugging Face's words."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    activation: Activation
    rope: Rope
    tie_word_embeddings: bool
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def facts(self, parameters: int) -> ModelFacts:
        """Return the manifest's description; ``parameters`` counts the weights, tied ones once."""
        return ModelFacts(
            model_type=self.model_type,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            rope=self.rope.facts(),
            tie_word_embeddings=self.tie_word_embeddings,
            parameters=parameters,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """What the build's precision injects."""

    linear: LinearFactory
    embedding: EmbeddingFactory
    head: LinearFactory


class Context(NamedTuple):
    """What every layer shares."""

    lengths: CacheLengths
    rope: RopeTables


class DecoderLayer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_attention_norm: RMSNorm, mlp: GatedMLP) -> None:
        self._input_norm, self._attention = input_norm, attention
        self._post_attention_norm, self._mlp = post_attention_norm, mlp

    def __call__(self, graph: Graph, stream: Stream, context: Context, past: LayerCache) -> tuple[Stream, LayerCache]:
        """Run the layer on a stream of [B, S, hidden_size]; return the stream and the cache after it."""
        with graph.scope("input_layernorm"):
            normed, residual = self._input_norm(graph, stream)
        with graph.scope("self_attn"):
            attended, present = self._attention(graph, normed, context.lengths, context.rope, past)
        with graph.scope("post_attention_layernorm"):
            normed, residual = self._post_attention_norm(graph, Stream(residual, attended))
        with graph.scope("mlp"):
            return Stream(residual, self._mlp(graph, normed)), present


class CausalLM:
    """A whole decoder; subclasses replace single parts."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts

    def build(self, graph: Graph) -> None:
        """Emit the graph of the module's contract and declare its weights."""
        config = self.config
        token_ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
        past = [self._past(graph, index) for index in range(config.num_hidden_layers)]
        logits_start = graph.input_with_default("logits_start", np.zeros(1, dtype=np.int64))
        embedding = self.make_embedding(graph)
        with graph.scope("model"):
            rope = declare_tables(graph, config.rope, config.max_position_embeddings)
            context = Context(cache_lengths(graph, mask), rope)
            with graph.scope("embed_tokens"):
                stream = Stream(embedding.lookup(graph, token_ids))
            present = []
            for index in range(config.num_hidden_layers):
                with graph.scope(f"layers.{index}"):
                    stream, cache = self.make_layer(index)(graph, stream, context, past[index])
                present.append(cache)
            with graph.scope("norm"):
                hidden, _ = self.make_norm("model.norm")(graph, stream)
        with graph.scope("lm_head"):
            logits = self.emit_head(graph, embedding, _from_row(graph, hidden, logits_start))
        graph.publish(logits, "logits", np.float32, ["batch_size", "logits_length", config.vocab_size])
        for index, cache in enumerate(present):
            self._publish(graph, index, cache)

    def make_embedding(self, graph: Graph) -> Embedding:
        """Declare the token embedding."""
        spec = EmbeddingSpec("model.embed_tokens", self.config.vocab_size, self.config.hidden_size)
        return self.parts.embedding(graph, spec)

    def make_norm(self, name: str) -> RMSNorm:
        """Return a norm over the hidden states."""
        return RMSNorm(name, self.config.hidden_size, self.config.norm_epsilon)

    def make_layer(self, index: int) -> DecoderLayer:
        """Return layer ``index``."""
        name = f"model.layers.{index}"
        return DecoderLayer(
            self.make_norm(f"{name}.input_layernorm"),
            self.make_attention(f"{name}.self_attn"),
            self.make_norm(f"{name}.post_attention_layernorm"),
            self.make_mlp(f"{name}.mlp"),
        )

    def make_attention(self, name: str) -> Attention:
        """Return a layer's attention."""
        config = self.config
        shape = AttentionShape(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            config.attention_output_bias,
        )
        return Attention(name, shape, self.parts.linear)

    def make_mlp(self, name: str) -> GatedMLP:
        """Return a layer's MLP."""
        config = self.config
        return GatedMLP(
            name,
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            self.parts.linear,
            bias=config.mlp_bias,
        )

    def emit_head(self, graph: Graph, embedding: Embedding, hidden: Value) -> Value:
        """From hidden states [B, n, hidden_size] to logits [B, n, vocab_size]."""
        config = self.config
        if config.tie_word_embeddings:
            return embedding.project(graph, hidden)
        source = linear_source("lm_head", config.vocab_size, config.hidden_size)
        spec = LinearSpec("lm_head", (source,), config.hidden_size, config.vocab_size, group="head")
        return self.parts.head(graph, hidden, spec)

    def _past(self, graph: Graph, index: int) -> LayerCache:
        shape = self._cache_shape("past_sequence_length")
        return LayerCache(
            graph.input(f"past_key_values.{index}.key", np.float32, shape),
            graph.input(f"past_key_values.{index}.value", np.float32, shape),
        )

    def _publish(self, graph: Graph, index: int, cache: LayerCache) -> None:
        shape = self._cache_shape("present_sequence_length")
        graph.publish(cache.key, f"present.{index}.key", np.float32, shape)
        graph.publish(cache.value, f"present.{index}.value", np.float32, shape)

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.config.num_key_value_heads, length, self.config.head_dim]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a file in ``models/`` exports as ``ARCHITECTURE``.

    Attributes:
        read_config: From the fields of a ``config.json`` to the decoder's config.
        model: From config and parts to the decoder.
    """

    read_config: Callable[[Fields], DecoderConfig]
    model: Callable[[DecoderConfig, Parts], CausalLM]


def _from_row(graph: Graph, hidden: Value, start: Value) -> Value:
    """Drop the first ``start`` positions of [B, S, hidden_size]."""
    end = graph.constant(np.array([np.iinfo(np.int64).max], dtype=np.int64))
    (kept,) = graph.op("Slice", [hidden, start, end, graph.constant(np.array([1], dtype=np.int64))])
    return kept
