"""Caches of windowed layers: a layer that sees the last ``window`` tokens need not keep more of them.

``GroupQueryAttention`` with ``sliding_window_cache=1`` works on a buffer of any ``capacity >= window``. It keeps the
latest tokens in its first rows, in their order, and when the buffer is full drops so many of the oldest at once that
``window`` are left. How many tokens are resident follows from the number of tokens alone, however they were computed;
see the operator's description in onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lamplighter_agent.package.manifest import ModelFacts

_SLACK_TOKENS: Final = 256
"""Tokens kept beyond the window: the kernel moves the window once in so many steps, and reads so many rows more."""

_MIN_WINDOW_TOKENS: Final = 16
"""A prompt is computed in chunks of at most the window, which must not become tiny."""


@dataclass(frozen=True, slots=True)
class WindowedLayers:
    """The layers of a model that keep a window.

    Attributes:
        layers: Their indices, ascending.
        window: Tokens that a token sees, itself counted.
        capacity: Rows of their buffers.
    """

    layers: tuple[int, ...]
    window: int
    capacity: int

    @property
    def step(self) -> int:
        """Tokens that are dropped at once."""
        return self.capacity - self.window + 1

    def resident(self, tokens: int) -> int:
        """Return how many of a slot's ``tokens`` tokens are in the buffers: the latest ones, from row 0 on."""
        if tokens <= self.capacity:
            return tokens
        return tokens - self.step * -(-(tokens - self.capacity) // self.step)

    def first(self, tokens: int) -> int:
        """Return the position of the token in row 0."""
        return tokens - self.resident(tokens)


def windowed_layers(model: ModelFacts, context_tokens: int) -> WindowedLayers | None:
    """Return the layers whose buffers can be smaller than a context; None if there is nothing to gain."""
    window = model.sliding_window
    if window is None or window < _MIN_WINDOW_TOKENS or window + _SLACK_TOKENS >= context_tokens:
        return None
    layers = tuple(range(model.num_hidden_layers)) if model.sliding_layers is None else tuple(model.sliding_layers)
    return WindowedLayers(layers, window, window + _SLACK_TOKENS) if layers else None
