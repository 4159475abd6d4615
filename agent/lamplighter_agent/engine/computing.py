"""What the scheduler needs of whatever computes: the model's runner, or a toy in its place."""

from __future__ import annotations

from collections.abc import Callable
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


def prompt_rows(compute: Callable[[int, list[int]], Logits], cache: KVCache, slot: int, tokens: list[int]) -> Logits:
    """Append the next tokens of a prompt to a slot, none of them alone behind others.

    Kernels for one row round otherwise than those for many, and a longer prompt that begins with this one takes over
    its keys. ``chunk_length`` leaves no single token behind but where windowed layers have just dropped some; that one
    is computed with a companion, which is forgotten at once.

    Args:
        compute: ``Runner.prefill_rows`` or ``Runner.hidden_states``.
        cache: The runner's cache.
        slot: The row.
        tokens: At least one token id.

    Returns:
        What ``compute`` gives for each token.

    Raises:
        EngineError: If the model fails; the slot's offset is unchanged.
    """
    if len(tokens) > 1 or not cache.offset(slot) or cache.room(slot) < 2:
        return compute(slot, tokens)
    rows = compute(slot, tokens * 2)
    cache.trim(slot, 1)
    return rows[:1]


def prompt_logits(runner: Runner, slot: int, tokens: list[int]) -> Logits:
    """Append the next tokens of a prompt to a slot, as ``prompt_rows``; return the logits behind the last one.

    Raises:
        EngineError: If the model fails; the slot's offset is unchanged.
    """
    if len(tokens) > 1:
        return runner.prefill(slot, tokens)
    last: Logits = prompt_rows(runner.prefill_rows, runner.cache, slot, tokens)[-1]
    return last
