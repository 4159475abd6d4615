"""``mistral``: Mistral 7B, Ministral and their kin. The base decoder with one difference.

- Every layer sees the last ``sliding_window`` tokens; 4096 where the field is missing, all tokens where it is null.
"""

from __future__ import annotations

from lamplighter_builder.components.mlp import find_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``MistralForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation or rope type are not supported.
    """
    sizes = read_sizes(config)
    return DecoderConfig(
        **sizes,
        model_type="mistral",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=find_activation(config.text("hidden_act")),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        sliding_window=read_window(config, default=4096),
    )


ARCHITECTURE = Architecture(read_config, CausalLM)
