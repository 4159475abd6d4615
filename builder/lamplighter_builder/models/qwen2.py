"""``qwen2``: Qwen 2 and 2.5. The base decoder with these differences.

- Query, key and value have biases, the output projection has none.
- With ``use_sliding_window`` the layers from ``max_window_layers`` on are windowed, or as ``layer_types`` says.
"""

from __future__ import annotations

from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes, read_sliding_layers, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``Qwen2ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or a layer type are not supported.
    """
    sizes = read_sizes(config)
    window, sliding_layers = read_switched_window(config)
    return DecoderConfig(
        **sizes,
        model_type="qwen2",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=True,
        sliding_window=window,
        sliding_layers=sliding_layers,
    )


def read_switched_window(config: Fields) -> tuple[int | None, tuple[int, ...] | None]:
    """Read window and windowed layers of a family that has ``use_sliding_window``.

    Raises:
        CheckpointError: If a field is of another type.
        UnsupportedModelError: If a layer type is not supported.
    """
    window = read_window(config, default=4096) if config.flag("use_sliding_window", default=False) else None
    if window is None:
        return None, None
    layers, full = config.integer("num_hidden_layers"), config.integer("max_window_layers", default=28)
    kinds = ["full_attention" if index < full else "sliding_attention" for index in range(layers)]
    sliding = read_sliding_layers(config, kinds)
    return (window, sliding) if sliding else (None, None)


ARCHITECTURE = Architecture(read_config, CausalLM)
