"""Reading the fields that most Llama-shaped families share; each family says in its own file what differs."""

from __future__ import annotations

from typing import TypedDict

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.fields import Fields

_LAYER_KINDS = ("full_attention", "sliding_attention")


class Sizes(TypedDict):
    """Arguments of ``DecoderConfig`` that every family has."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int


def read_sizes(config: Fields) -> Sizes:
    """Read the sizes; ``head_dim`` is ``hidden_size / num_attention_heads`` where it is not given.

    Raises:
        CheckpointError: If a field is missing or of another type.
    """
    hidden_size, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return Sizes(
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.integer("num_key_value_heads", default=heads),
        head_dim=config.integer("head_dim", default=hidden_size // heads),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
    )


def read_window(config: Fields, *, default: int | None = None) -> int | None:
    """Read ``sliding_window``: ``default`` if the field is missing, None if it is null.

    Raises:
        CheckpointError: If it is no whole number.
    """
    if "sliding_window" not in config.values:
        return default
    return config.integer("sliding_window") if config.has("sliding_window") else None


def read_sliding_layers(config: Fields, default: list[str]) -> tuple[int, ...]:
    """Read ``layer_types`` and return the indices of the windowed layers.

    Raises:
        UnsupportedModelError: If a layer is of another kind, or there are too few.
    """
    kinds = config.texts("layer_types") or tuple(default)
    unknown = sorted(set(kinds) - set(_LAYER_KINDS))
    if unknown or len(kinds) != config.integer("num_hidden_layers"):
        what = f"layer type {unknown[0]!r}" if unknown else f"{len(kinds)} layer_types"
        raise UnsupportedModelError(
            f"{config.origin}: {what} is not supported",
            hint=f"one of {', '.join(_LAYER_KINDS)} for each layer is",
        )
    return tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")


def refuse(config: Fields, key: str) -> None:
    """Refuse a switch that is on.

    Raises:
        UnsupportedModelError: If the flag is true.
    """
    if config.flag(key, default=False):
        raise UnsupportedModelError(f"{config.origin}: {key} true is not supported")
