"""``llama``: Llama 2 and 3, SmolLM2, TinyLlama. The base decoder as it is; rope may be scaled."""

from __future__ import annotations

from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``LlamaForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation or rope type are not supported.
    """
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", default=False)
    return DecoderConfig(
        **sizes,
        model_type="llama",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


ARCHITECTURE = Architecture(read_config, CausalLM)
