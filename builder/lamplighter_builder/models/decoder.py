"""The Llama-shaped base: pre-norm layers of grouped-query attention and a gated MLP, a final norm and a head.

Graph contract of every decoder:

====================================== ======= ============================================
input                                  dtype   shape
====================================== ======= ============================================
``input_ids``                          int64   [batch_size, sequence_length]
``attention_mask``                     int64   [batch_size, total_sequence_length]
``past_key_values.{i}.key|value``      float32 [batch_size, kv_heads, past, head_dim]
``logits_start`` (default 0)           int64   [1]
``rope_tokens`` (default 0)            int64   [1] or [batch_size]; only with LongRoPE
output
``logits``                             float32 [batch_size, logits_length, vocab_size]
``present.{i}.key|value``              float32 [batch_size, kv_heads, total, head_dim]
====================================== ======= ============================================

Rows of ``attention_mask`` are ones, then zeros. With B > 1, S must be 1 if there is a past. ``logits_start`` drops the
first positions before the head; ``rope_tokens`` is explained in ``components/positions.py``. A family overrides
``make_*`` methods in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.components.attention import (
    Attention,
    AttentionShape,
    CacheLengths,
    LayerCache,
    cache_lengths,
)
from lamplighter_builder.components.embedding import Embedding, EmbeddingFactory, EmbeddingSpec
from lamplighter_builder.components.linear import LinearFactory, declare_bias, module_spec
from lamplighter_builder.components.mlp import MLP, Activation, GatedMLP
from lamplighter_builder.components.moe import ExpertsFactory
from lamplighter_builder.components.norm import Norm, RMSNorm, Stream
from lamplighter_builder.components.positions import long_rope_positions, token_positions
from lamplighter_builder.components.rope import ROTARY_STEP, LongRope, Rope, RopeTables, declare_tables
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, Value

_HEAD_STEP: Final = 8
"""``GroupQueryAttention`` takes heads whose size is a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What every decoder of this shape has, in Hugging Face's words.

    Attributes:
        norm_epsilon: Of every norm.
        sliding_window: Tokens that a windowed layer sees; None if no layer is windowed.
        sliding_layers: Indices of the windowed layers; None for all of them.
        attention_scale: Factor of the attention scores; None for ``1 / sqrt(head_dim)``.
        head_bias: True if the head has a bias.
    """

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
    head_bias: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    attention_scale: float | None = None

    def window(self, index: int) -> int | None:
        """Return how many tokens layer ``index`` sees; None for all."""
        return self.sliding_window if self.sliding_layers is None or index in self.sliding_layers else None

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
            sliding_window=self.sliding_window,
            sliding_layers=None if self.sliding_window is None else self.sliding_layers,
            tie_word_embeddings=self.tie_word_embeddings,
            parameters=parameters,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """What the build's precision injects."""

    linear: LinearFactory
    embedding: EmbeddingFactory
    head: LinearFactory
    experts: ExpertsFactory


class Context(NamedTuple):
    """What every layer is given."""

    lengths: CacheLengths
    rope: RopeTables


class Layer(Protocol):
    """A layer of a decoder."""

    def __call__(self, graph: Graph, stream: Stream, context: Context, past: LayerCache) -> tuple[Stream, LayerCache]:
        """Run the layer on a stream of [B, S, hidden_size]; return the stream and the cache after it."""


class DecoderLayer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, input_norm: Norm, attention: Attention, post_attention_norm: Norm, mlp: MLP) -> None:
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

    final_norm: ClassVar[str] = "model.norm"
    """Module path of the norm before the head."""

    mlp_module: ClassVar[str] = "mlp"
    """Name of a layer's MLP in the checkpoint."""

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
            lengths = cache_lengths(graph, mask)
            ropes = self.make_ropes(graph, token_ids, mask)
            with graph.scope("embed_tokens"):
                stream = Stream(self.embed(graph, embedding, token_ids))
            present = []
            for index in range(config.num_hidden_layers):
                context = Context(lengths, ropes[self.rope_of(index)])
                with graph.scope(f"layers.{index}"):
                    stream, cache = self.make_layer(index)(graph, stream, context, past[index])
                present.append(cache)
            with graph.scope("norm"):
                hidden, _ = self.make_norm(self.final_norm)(graph, stream)
        with graph.scope("lm_head"):
            logits = self.emit_head(graph, embedding, _from_row(graph, hidden, logits_start))
        graph.publish(logits, "logits", np.float32, ["batch_size", "logits_length", config.vocab_size])
        # For embeddings. It is computed anyway, and a caller that does not bind it pays nothing.
        graph.publish(hidden, "hidden_states", np.float32, ["batch_size", "sequence_length", config.hidden_size])
        for index, cache in enumerate(present):
            self._publish(graph, index, cache)

    def make_embedding(self, graph: Graph) -> Embedding:
        """Declare the token embedding."""
        spec = EmbeddingSpec("model.embed_tokens", self.config.vocab_size, self.config.hidden_size)
        return self.parts.embedding(graph, spec)

    def embed(self, graph: Graph, embedding: Embedding, token_ids: Value) -> Value:
        """From token ids [B, S] to the first hidden states [B, S, hidden_size]."""
        return embedding.lookup(graph, token_ids)

    def make_ropes(self, graph: Graph, token_ids: Value, mask: Value) -> list[RopeTables]:
        """Declare the rotary tables; ``rope_of`` says which of them a layer uses."""
        return [self.declare_rope(graph, self.config.rope, token_ids, mask)]

    def declare_rope(self, graph: Graph, rope: Rope, token_ids: Value, mask: Value, name: str = "rope") -> RopeTables:
        """Declare the tables of one rope, with positions where the attention does not know which rows to take."""
        positions = self.config.max_position_embeddings
        tables = declare_tables(graph, rope, positions, name)
        if isinstance(rope, LongRope):
            return tables._replace(position_ids=long_rope_positions(graph, rope, positions, token_ids, mask))
        if rope.rotary_dim % ROTARY_STEP:
            return tables._replace(position_ids=token_positions(graph, token_ids, mask))
        return tables

    def rope_of(self, _index: int) -> int:
        """Return which of ``make_ropes`` layer ``index`` uses."""
        return 0

    def make_norm(self, name: str) -> Norm:
        """Return a norm over the hidden states."""
        return RMSNorm(name, self.config.hidden_size, self.config.norm_epsilon)

    def make_layer(self, index: int) -> Layer:
        """Return layer ``index``."""
        name = f"model.layers.{index}"
        return DecoderLayer(
            self.make_norm(f"{name}.input_layernorm"),
            self.make_attention(f"{name}.self_attn", index),
            self.make_norm(f"{name}.post_attention_layernorm"),
            self.make_mlp(f"{name}.{self.mlp_module}"),
        )

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        return Attention(name, self.attention_shape(index), self.parts.linear)

    def attention_shape(self, index: int) -> AttentionShape:
        """Return sizes and options of the attention of layer ``index``."""
        config = self.config
        return AttentionShape(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            config.attention_output_bias,
            config.window(index),
            config.attention_scale,
        )

    def make_mlp(self, name: str) -> MLP:
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
        spec = module_spec("lm_head", config.hidden_size, config.vocab_size, bias=config.head_bias, group="head")
        if not config.tie_word_embeddings:
            return self.parts.head(graph, hidden, spec)
        logits = embedding.project(graph, hidden)
        if config.head_bias:
            (logits,) = graph.op("Add", [logits, declare_bias(graph, spec)])
        return logits

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


ConfigT = TypeVar("ConfigT", bound=DecoderConfig)


@dataclass(frozen=True, slots=True)
class Architecture(Generic[ConfigT]):
    """What a file in ``models/`` exports as ``ARCHITECTURE``.

    Attributes:
        read_config: From the fields of a ``config.json`` to the decoder's config.
        model: From config and parts to the decoder.
    """

    read_config: Callable[[Fields], ConfigT]
    model: Callable[[ConfigT, Parts], CausalLM]

    def make(self, config: Fields, parts: Parts) -> CausalLM:
        """Read a ``config.json`` and return its decoder.

        Raises:
            CheckpointError: If a field is missing or of another type.
            UnsupportedModelError: If it asks for something that is not supported.
        """
        read = self.read_config(config)
        if read.head_dim % _HEAD_STEP:
            raise UnsupportedModelError(
                f"{config.origin}: heads of {read.head_dim} features are not supported",
                hint=f"onnxruntime's attention takes multiples of {_HEAD_STEP}",
            )
        return self.model(read, parts)


def _from_row(graph: Graph, hidden: Value, start: Value) -> Value:
    """Drop the first ``start`` positions of [B, S, hidden_size]."""
    end = graph.constant(np.array([np.iinfo(np.int64).max], dtype=np.int64))
    (kept,) = graph.op("Slice", [hidden, start, end, graph.constant(np.array([1], dtype=np.int64))])
    return kept
