"""``llama``: Llama 2 and 3, SmolLM2, TinyLlama. The base decoder as it is; rope may be scaled (linear, llama3)."""

from __future__ import annotations

from lamplighter_builder.components.mlp import find_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``LlamaForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation or rope type are not supported.
    """
    hidden_size, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=hidden_size // heads)
    bias = config.flag("attention_bias", default=False)
    return DecoderConfig(
        model_type="llama",
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        norm_epsilon=config.number("rms_norm_eps"),
        activation=find_activation(config.text("hidden_act")),
        rope=read_rope(config, head_dim),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


ARCHITECTURE = Architecture(read_config, CausalLM)
