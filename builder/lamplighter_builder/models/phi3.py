"""``phi3``: Phi-3 and 3.5 mini and medium, Phi-4, Phi-4-mini. The base decoder with these differences.

- The checkpoint holds query, key and value as one tensor, and gate and up as another.
- Rope may be ``longrope`` (``su`` and ``yarn`` in early configs mean the same), and may cover only the first
  ``partial_rotary_factor`` of each head.
- Every layer sees the last ``sliding_window`` tokens, all tokens where the field is null or missing.
"""

from __future__ import annotations

from typing import Final

from lamplighter_builder.components.attention import Attention, FusedAttention
from lamplighter_builder.components.mlp import MLP, FusedGatedMLP, read_activation
from lamplighter_builder.components.rope import Rope, read_partial_rotary_dim, read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_sizes, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig

_EARLY_NAMES: Final = ("su", "yarn")


def read_config(config: Fields) -> DecoderConfig:
    """Read a ``config.json`` of ``Phi3ForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation or rope type are not supported.
    """
    sizes = read_sizes(config)
    return DecoderConfig(
        **sizes,
        model_type="phi3",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=read_phi3_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        sliding_window=read_window(config),
    )


def read_phi3_rope(config: Fields, head_dim: int) -> Rope:
    """Read the rope with the early names of ``longrope``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If the rope type is not supported.
    """
    return read_rope(with_present_rope_names(config), read_partial_rotary_dim(config, head_dim, default=1.0))


def with_present_rope_names(config: Fields) -> Fields:
    """Return the config with the present name of ``longrope``.

    Raises:
        CheckpointError: If a section is of another type.
    """
    values = dict(config.values)
    for key in ("rope_parameters", "rope_scaling"):
        section = config.section(key)
        for name in ("rope_type", "type"):
            if section is not None and section.values.get(name) in _EARLY_NAMES:
                values[key] = {**section.values, name: "longrope"}
    return Fields(values, config.origin)


class Phi3(CausalLM):
    """The decoder with fused tensors."""

    def make_attention(self, name: str, index: int) -> Attention:
        """Return the attention of layer ``index``."""
        return FusedAttention(name, self.attention_shape(index), self.parts.linear)

    def make_mlp(self, name: str) -> MLP:
        """Return a layer's MLP."""
        config = self.config
        return FusedGatedMLP(name, config.hidden_size, config.intermediate_size, config.activation, self.parts.linear)


ARCHITECTURE = Architecture(read_config, Phi3)
