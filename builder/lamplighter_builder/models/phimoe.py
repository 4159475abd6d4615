"""``phimoe``: Phi-3.5-MoE. These differences from the base decoder.

- A router and experts in place of the MLP; each token takes two of them, chosen and weighted by SparseMixer.
- LayerNorms with bias; biases of attention and head where the config has them.
- Rope may be ``longrope`` with a factor of cos and sin for each set (``short_mscale``, ``long_mscale``).
- Every layer sees the last ``sliding_window`` tokens, all tokens where the field is null or missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.components.mlp import MLP, read_activation
from lamplighter_builder.components.moe import EXPERTS_PER_TOKEN, ExpertsSpec, SparseMoE
from lamplighter_builder.components.norm import LayerNorm, Norm
from lamplighter_builder.components.rope import LongRope, Rope, read_rope
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import read_size, read_sizes, read_window
from lamplighter_builder.models.decoder import Architecture, CausalLM, DecoderConfig, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class PhimoeConfig(DecoderConfig):
    """``num_local_experts`` a layer; ``router_jitter_noise`` says which scores come near the best one."""

    num_local_experts: int
    router_jitter_noise: float


def read_config(config: Fields) -> PhimoeConfig:
    """Read a ``config.json`` of ``PhimoeForCausalLM``.

    Raises:
        CheckpointError: If a field is missing or of another type.
        UnsupportedModelError: If activation, rope type or the number of experts a token takes are not supported.
    """
    sizes = read_sizes(config)
    bias = config.flag("attention_bias", default=False)
    taken = config.integer("num_experts_per_tok", default=EXPERTS_PER_TOKEN)
    if taken != EXPERTS_PER_TOKEN:
        raise UnsupportedModelError(
            f"{config.origin}: num_experts_per_tok {taken} is not supported", hint=f"supported is: {EXPERTS_PER_TOKEN}"
        )
    return PhimoeConfig(
        **sizes,
        model_type="phimoe",
        norm_epsilon=config.positive("rms_norm_eps"),
        activation=read_activation(config),
        rope=_read_scaled_rope(config, sizes["head_dim"]),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        attention_bias=bias,
        attention_output_bias=bias,
        head_bias=config.flag("lm_head_bias", default=False),
        sliding_window=read_window(config),
        num_local_experts=read_size(config, "num_local_experts", most=1024),
        router_jitter_noise=config.number("router_jitter_noise", default=0.01),
    )


def _read_scaled_rope(config: Fields, head_dim: int) -> Rope:
    rope = read_rope(config, head_dim, default_theta=1_000_000.0)
    section = config.section("rope_parameters") or config.section("rope_scaling")
    if not isinstance(rope, LongRope) or section is None:
        return rope
    return replace(
        rope,
        short_amplitude=section.number("short_mscale"),
        long_amplitude=section.number("long_mscale"),
    )


class Phimoe(CausalLM):
    """The decoder with experts."""

    config: PhimoeConfig
    mlp_module: ClassVar[str] = "block_sparse_moe"

    def __init__(self, config: PhimoeConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config

    def make_norm(self, name: str) -> Norm:
        """Return a norm over the hidden states."""
        return LayerNorm(name, self.config.hidden_size, self.config.norm_epsilon)

    def make_mlp(self, name: str) -> MLP:
        """Return a layer's router with its experts."""
        config = self.config
        experts = ExpertsSpec(
            f"{name}.experts",
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            config.activation,
        )
        return SparseMoE(name, experts, config.router_jitter_noise, self.parts.experts)


ARCHITECTURE = Architecture(read_config, Phimoe)
