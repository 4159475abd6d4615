"""What the scheduler needs of whatever computes: the model's runner, or a toy in its place."""

from __future__ import annotations

from typing import Protocol

from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.truncation import Logits


class Runner(Protocol):
    """What computes; see ``runner.ModelRunner``."""

    @property
    def cache(self) -> KVCache:
        """The cache whose slots the scheduler assigns."""

    def prefill(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the logits behind the last one."""

    def prefill_rows(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the logits behind each."""

    @property
    def hidden_size(self) -> int | None:
        """Features of a hidden state; None if there are none to be had."""

    def hidden_states(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the last hidden state of each."""

    def decode(self, tokens: list[int]) -> Logits:
        """Append a token to each of the first slots and return a row of logits for each."""

    def verify(self, tokens: list[int]) -> Logits:
        """Append tokens to slot 0 and return a row of logits for each, the same as from ``decode`` one by one."""

    def exactness(self, rows: int) -> bool | None:
        """Return whether ``verify`` takes this many tokens in one step; None if the first time will tell."""
