"""The options that are texts, as tokens: banned and forced words, sequence breakers.

A word is banned as the token sequences that its text, as written and behind a space, is encoded to. Another spelling in
tokens is not found: sampling hardly ever takes one, and a grammar (``guided_regex``) is the tool where none may occur.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lamplighter_agent.engine.detokenizer import TextCodec
from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """Options of one request that are texts, resolved.

    Attributes:
        banned: Token sequences that are never completed.
        prefix: Tokens that the text begins with.
        forced: Texts that must occur, each with its tokens.
        limit: Most tokens to draw; what is forced comes before it.
        is_breaker: Tells of a token whether it ends a repetition for DRY.
        decode: Turns tokens into text.
    """

    banned: tuple[Tokens, ...] = ()
    prefix: Tokens = ()
    forced: tuple[tuple[str, Tokens], ...] = ()
    limit: int = 0
    is_breaker: Callable[[int], bool] = field(default=lambda token_id: False)
    decode: Callable[[list[int]], str] = field(default=lambda token_ids: "")

    def missing(self, history: History) -> list[Tokens]:
        """Return the tokens of each forced text that the generated text does not contain."""
        if not self.forced:
            return []
        text = self.decode(history.tokens[history.prompt_tokens :].tolist())
        return [tokens for word, tokens in self.forced if word not in text]


def resolve_words(params: GenerationParams, codec: TextCodec, *, limit: int) -> Words:
    """Turn the options that are texts into tokens.

    Args:
        params: The options.
        codec: The tokenizer.
        limit: Most tokens that the request may generate.

    Raises:
        RequestError: If what is forced needs more tokens than ``limit``.
    """

    def tokens_of(text: str) -> Tokens:
        return tuple(codec.encode(text, special=False))

    banned = {tokens_of(text) for word in params.banned_words for text in (word, f" {word}")}
    prefix = tokens_of(params.forced_prefix) if params.forced_prefix else ()
    forced = tuple((word, tokens_of(word)) for word in params.forced_words)
    needed = len(prefix) + sum(len(tokens) for _, tokens in forced)
    if needed > limit:
        raise RequestError(
            f"what is forced has {needed} tokens, but the request may generate {limit}",
            param="forced_words" if forced else "forced_prefix",
        )
    return Words(
        banned=tuple(sorted(banned - {()})),
        prefix=prefix,
        forced=forced,
        limit=limit,
        is_breaker=_breakers(params.dry_sequence_breakers, codec),
        decode=codec.decode,
    )


def _breakers(texts: tuple[str, ...], codec: TextCodec) -> Callable[[int], bool]:
    known: dict[int, bool] = {}

    def is_breaker(token_id: int) -> bool:
        found = known.get(token_id)
        if found is None:
            text = codec.token_text(token_id)
            found = known[token_id] = any(breaker in text for breaker in texts)
        return found

    return is_breaker
