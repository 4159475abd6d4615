"""``smollm3``: SmolLM3. The base decoder with these differences.

- Layers for which ``no_rope_layers`` has 0, every ``no_rope_layer_interval``-th where it is missing, do not rotate
  queries and keys.
- With ``use_sliding_window`` those layers are windowed, or others as ``layer_types`` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from lamplighter_agent.errors import CheckpointError
from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.components.attention import Attention, UnrotatedAttention
from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_size, read_sizes, read_sliding_layers, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Smollm3Config(DecoderConfig):
    """``unrotated_layers`` are the indices of the layers without rotary embedding."""

    unrotated_layers: tuple[int, ...]

    def facts(self, parameters: int) -> ModelFacts:
        """Return the manifest's description; ``parameters`` counts the weights, tied ones once."""
        facts = DecoderConfig.facts(self, parameters)
        return msgspec.structs.replace(facts, unrotated_layers=self.unrotated_layers)


def read_config(config: Fields) -> Smollm3Config:
    """Read a ``config.json`` of ``SmolLM3ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or a layer type are not supported.
    """
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", default=False)
    layers = sizes["num_hidden_layers"]
    unrotated = read_unrotated_layers(config, layers)
    window = read_window(config) if config.flag("use_sliding_window", default=False) else None
    kinds = ["sliding_attention" if index in unrotated else "full_attention" for index in range(layers)]
    sliding = () if window is None else read_sliding_layers(config, kinds)
    return Smollm3Config(
        **sizes,
        model_type="smollm3",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, sizes["head_dim"], default_theta=2_000_000.0),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=True),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        sliding_window=window if sliding else None,
        sliding_layers=sliding or None,
        unrotated_layers=unrotated,
    )


def read_unrotated_layers(config: Fields, layers: int) -> tuple[int, ...]:
    """Return the indices of the layers without rotary embedding.

    Raises:
        CheckpointError: If ``no_rope_layers`` does not say 0 or 1 for every layer.
    """
    if not config.has("no_rope_layers"):
        interval = read_size(config, "no_rope_layer_interval", default=4)
        return tuple(range(interval - 1, layers, interval))
    rotated = config.numbers("no_rope_layers")
    if len(rotated) < layers or not set(rotated) <= {0, 1}:
        raise CheckpointError(f"{config.origin}: no_rope_layers must have 0 or 1 for each of {layers} layers")
    return tuple(index for index in range(layers) if not rotated[index])


class Smollm3(CausalLM):
    """The decoder with layers that do not rotate."""

    config: Smollm3Config

    def __init__(self, config: Smollm3Config, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        kind = UnrotatedAttention if index in self.config.unrotated_layers else Attention
        return kind(name, self.attention_shape(index), self.parts.linear)


ARCHITECTURE = Architecture(read_config, Smollm3)
