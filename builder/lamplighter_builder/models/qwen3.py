"""``qwen3``: Qwen 3. The base decoder with these differences.

- Each head of query and key has an RMS norm before the rotation.
- ``head_dim`` is a field of its own, 128 where it is missing.
- Windowed layers as in ``qwen2``.
"""

from __future__ import annotations

from lamplighter_builder.components.attention import Attention, NormedAttention
from lamplighter_builder.components.mlp import read_activation
from lamplighter_builder.components.norm import RMSNorm
from lamplighter_builder.components.rope import read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig
from lamplighter_builder.models.qwen2 import read_switched_window


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``Qwen3ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or a layer type are not supported.
    """
    sizes = read_sizes(config)
    sizes["head_dim"] = config.integer("head_dim", default=128)
    bias = config.flag("attention_bias", default=False)
    window, sliding_layers = read_switched_window(config)
    return DecoderConfig(
        **sizes,
        model_type="qwen3",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        sliding_window=window,
        sliding_layers=sliding_layers,
    )


class Qwen3(CausalLM):
    """The decoder with normed heads."""

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        config = self.config
        norms = (RMSNorm(f"{name}.{part}_norm", config.head_dim, config.norm_epsilon) for part in "qk")
        return NormedAttention(name, self.attention_shape(index), self.parts.linear, *norms)


ARCHITECTURE = Architecture(read_config, Qwen3)
