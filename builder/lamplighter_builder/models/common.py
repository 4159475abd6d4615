"""Reading the fields that most Llama-shaped families share; each family says in its own file what differs."""

from __future__ import annotations

from typing import Final, TypedDict

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.fields import Fields

_LAYER_KINDS = ("full_attention", "sliding_attention")
_MOST: Final = 2**31 - 1
MOST_LAYERS: Final = 4096
"""A damaged config must not make a build that never ends."""


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
        CheckpointError: If a field is missing, of another type or out of range.
    """
    hidden_size, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
    key_heads = read_size(config, "num_key_value_heads", default=heads)
    if heads % key_heads:
        raise CheckpointError(
            f"{config.origin}: {heads} num_attention_heads cannot share {key_heads} num_key_value_heads"
        )
    return Sizes(
        hidden_size=hidden_size,
        intermediate_size=read_size(config, "intermediate_size"),
        num_hidden_layers=read_size(config, "num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=read_size(config, "head_dim", default=hidden_size // heads),
        vocab_size=read_size(config, "vocab_size"),
        # A prompt of one token and its answer.
        max_position_embeddings=read_size(config, "max_position_embeddings", least=2),
    )


def read_size(config: Fields, key: str, *, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
    """Read a number of things, of which there are ``least`` to ``most``.

    Raises:
        CheckpointError: If the field is missing, of another type or out of range.
    """
    value = config.integer(key, default=default)
    if not least <= value <= most:
        raise CheckpointError(f"{config.origin}: {key} is {value}, but must be from {least} to {most}")
    return value


def read_window(config: Fields, *, default: int | None = None) -> int | None:
    """Read ``sliding_window``: ``default`` if the field is missing, None if it is null.

    Raises:
        CheckpointError: If it is no whole number.
    """
    if "sliding_window" not in config.values:
        return default
    return read_size(config, "sliding_window") if config.has("sliding_window") else None


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
