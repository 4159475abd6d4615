"""Pinned prompts: system prompts from the configuration, computed before the first request needs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from lamplighter_agent.engine.computing import Runner, prompt_logits
from lamplighter_agent.engine.prefix_cache import PrefixCache, common_prefix
from lamplighter_agent.engine.sequence import chunk_length
from lamplighter_agent.package.chat_format import ChatMessage

logger = logging.getLogger(__name__)

_PROBES: Final = ("Hello", "1", "?", "\u00e4")
"""Words of a user that differ from their first character on."""


def pinned_tokens(text: str, encode: Callable[[list[ChatMessage]], list[int]]) -> list[int]:
    """Return the tokens with which every conversation under a system prompt begins.

    They are what conversations with different first words have in common, so that the chat format may put the system
    prompt wherever it wants.

    Args:
        text: The system prompt.
        encode: Renders and encodes a conversation.

    Raises:
        RequestError: If the chat format has no place for a system prompt.
    """
    system = ChatMessage("system", text)
    first, *others = [encode([system, ChatMessage("user", probe)]) for probe in _PROBES]
    return first[: min(common_prefix(first, other) for other in others)]


def warm(prefixes: PrefixCache, runner: Runner, sequences: Iterable[list[int]], *, chunk_tokens: int) -> None:
    """Bring sequences into the prefix cache and pin them: from disk as far as they are there, else computed.

    What fits neither into a slot nor into the cache, or would have keys of LongRoPE's long factors, is left out, with a
    warning. Slot 0 must be empty.

    Raises:
        EngineError: If the model fails.
    """
    cache = runner.cache
    for tokens in sequences:
        if len(tokens) > cache.capacity:
            logger.warning("a pinned prompt of %d tokens exceeds the context of %d", len(tokens), cache.capacity)
            continue
        cache.plan(0, len(tokens))
        if cache.rope_tokens(0):
            logger.warning("a pinned prompt of %d tokens outgrows LongRoPE's short factors", len(tokens))
            cache.release(0)
            continue
        prefixes.recall(tokens)
        begin = prefixes.restore(cache, 0, tokens)
        while begin < len(tokens):
            length = chunk_length(len(tokens) - begin, chunk_tokens, cache.stretch(0))
            prefixes.store_before_loss(cache, 0, length, pinned=True)
            prompt_logits(runner, 0, tokens[begin : begin + length])
            begin += length
        stored = prefixes.store(cache, 0, len(tokens), pinned=True)
        if stored < len(tokens):
            logger.warning("the prefix cache has room for %d of a pinned prompt's %d tokens", stored, len(tokens))
        cache.release(0)
