"""``gemma3_text``: Gemma 3 270M and 1B. ``gemma2`` with these differences.

- Each head of query and key has a norm before the rotation; attention scores have no bound.
- Five windowed layers to one that sees the whole text (``sliding_window_pattern``), or as ``layer_types`` says.
- Windowed layers have a rope of their own, unscaled, with ``rope_local_base_freq``.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.components.attention import Attention, NormedAttention
from lamplighter_builder.components.norm import OffsetRMSNorm
from lamplighter_builder.components.rope import Rope, RopeTables, make_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import Graph, Value
from lamplighter_builder.models.common import read_sizes, read_sliding_layers, read_window, refuse
from lamplighter_builder.models.decoder import Architecture, Parts
from lamplighter_builder.models.gemma import read_gemma_activation
from lamplighter_builder.models.gemma2 import Gemma2, Gemma2Config, read_softcap


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3TextConfig(Gemma2Config):
    """``local_rope`` is that of the windowed layers."""

    local_rope: Rope

    def facts(self, parameters: int) -> ModelFacts:
        """Return the manifest's description; ``parameters`` counts the weights, tied ones once."""
        facts = Gemma2Config.facts(self, parameters)
        return msgspec.structs.replace(facts, local_rope=self.local_rope.facts())


def read_config(config: Fields) -> Gemma3TextConfig:
    """Read a ``config.json`` of ``Gemma3ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type, attention or a layer type are not supported.
    """
    refuse(config, "use_bidirectional_attention")
    if config.has("attn_logit_softcapping"):
        raise UnsupportedModelError(
            f"{config.origin}: attn_logit_softcapping {config.values['attn_logit_softcapping']!r} is not supported",
            hint="gemma3_text has none",
        )
    sizes = read_sizes(config)
    sizes["head_dim"] = config.integer("head_dim", default=256)
    bias = config.flag("attention_bias", default=False)
    window = read_window(config, default=4096)
    every = config.integer("sliding_window_pattern", default=6)
    pattern = [
        "sliding_attention" if (index + 1) % every else "full_attention" for index in range(sizes["num_hidden_layers"])
    ]
    rope, local_rope = read_ropes(config, sizes["head_dim"])
    return Gemma3TextConfig(
        **sizes,
        model_type="gemma3_text",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_gemma_activation(config),
        rope=rope,
        local_rope=local_rope,
        tie_word_embeddings=config.flag("tie_word_embeddings", default=True),
        attention_bias=bias,
        attention_output_bias=bias,
        sliding_window=window,
        sliding_layers=read_sliding_layers(config, pattern),
        attention_scale=config.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=None,
        logits_softcap=read_softcap(config, "final_logit_softcapping"),
    )


def read_ropes(config: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """Read the ropes of whole-text and windowed layers, in their old and their new spelling.

    Raises:
        CheckpointError: If a field is of another type.
        UnsupportedModelError: If a rope type is not supported.
    """
    nested = config.section("rope_parameters")
    whole = None if nested is None else nested.section("full_attention")
    local = None if nested is None else nested.section("sliding_attention")
    theta = config.positive("rope_theta", default=1_000_000.0)
    local_theta = config.positive("rope_local_base_freq", default=10_000.0)
    return (
        make_rope(
            config,
            whole or config.section("rope_scaling"),
            theta=theta if whole is None else whole.positive("rope_theta", default=theta),
            rotary_dim=head_dim,
        ),
        make_rope(
            config,
            local,
            theta=local_theta if local is None else local.positive("rope_theta", default=local_theta),
            rotary_dim=head_dim,
        ),
    )


class Gemma3Text(Gemma2):
    """The decoder with normed heads and two ropes."""

    config: Gemma3TextConfig

    def __init__(self, config: Gemma3TextConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config

    def make_ropes(self, graph: Graph, token_ids: Value, mask: Value) -> list[RopeTables]:
        """Declare the tables of whole-text and of windowed layers."""
        local = self.declare_rope(graph, self.config.local_rope, token_ids, mask, "local_rope")
        return [*super().make_ropes(graph, token_ids, mask), local]

    def rope_of(self, index: int) -> int:
        """Return which of ``make_ropes`` layer ``index`` uses."""
        layers = self.config.sliding_layers
        return int(layers is not None and index in layers)

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        config = self.config
        norms = (OffsetRMSNorm(f"{name}.{part}_norm", config.head_dim, config.norm_epsilon) for part in "qk")
        return NormedAttention(name, self.attention_shape(index), self.parts.linear, *norms)


ARCHITECTURE = Architecture(read_config, Gemma3Text)
