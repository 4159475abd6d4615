"""``mistral`` and ``ministral``: Mistral 7B, Ministral 8B and their kin. The base decoder with one difference.

- Every layer, or those that ``layer_types`` names, sees the last ``sliding_window`` tokens; 4096 where the field is
  missing, all tokens where it is null.
"""

from __future__ import annotations

from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes, read_sliding_layers, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``MistralForCausalLM`` or ``MinistralForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or a layer type are not supported.
    """
    sizes = read_sizes(config)
    window = read_window(config, default=4096)
    every = ["sliding_attention"] * sizes["num_hidden_layers"]
    return DecoderConfig(
        **sizes,
        model_type="mistral",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        sliding_window=window,
        sliding_layers=None if window is None else read_sliding_layers(config, every),
    )


ARCHITECTURE = Architecture(read_config, CausalLM)
