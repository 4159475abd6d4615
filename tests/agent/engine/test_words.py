from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lamplighter_agent.engine.history import History, TokenIds
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.sampling import Hooks, Sampler, Scorer
from lamplighter_agent.engine.words import resolve_words
from lamplighter_agent.errors import RequestError
from support.toy_engine import byte_level_tokenizer

CODEC = byte_level_tokenizer()
VOCAB = CODEC.vocab_size
STOP = VOCAB - 1
PROMPT = CODEC.encode("Say: ", special=False)


def wanting(text: str, position: int) -> NDArray[np.float32]:
    """Return logits that prefer the next byte of ``text``, then the stop token, then 'z'."""
    ids = CODEC.encode(text, special=False)
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[ids[position] if position < len(ids) else STOP] = 9.0
    logits[CODEC.encode("z", special=False)] += 5.0
    return logits


def written(
    text: str, params: GenerationParams, *, limit: int = 30, scorer: Scorer | None = None, repeat: bool = False
) -> str:
    """Return what a sampler writes where the model wants ``text`` and then the end, over and over with ``repeat``."""
    sampler = Sampler(
        params,
        History(PROMPT),
        stop_ids=frozenset({STOP}),
        seed=1,
        vocab_size=VOCAB,
        words=resolve_words(params, CODEC, limit=limit),
        hooks=Hooks(scorer),
    )
    ids: list[int] = []
    for position in range(limit):
        token, _ = sampler.sample(wanting(text, position % len(text) if repeat else position))
        if token == STOP:
            break
        ids.append(token)
    return CODEC.decode(ids)


def options(**fields: object) -> GenerationParams:
    params = GenerationParams(temperature=0.0, **fields)  # type: ignore[arg-type]
    params.validate()
    return params


def test_a_banned_word_is_never_completed() -> None:
    assert written("a cat sat", options(banned_words=("cat",))) == "a caz sat"


def test_a_prefix_is_written_first() -> None:
    assert written("abcdef", options(forced_prefix="xy")) == "xycdef"


def test_a_missing_word_is_written_where_the_text_would_end() -> None:
    assert written("red", options(forced_words=(" green", " red"))) == "red green red"


def test_a_word_that_the_text_has_is_not_written_again() -> None:
    assert written("a green tree", options(forced_words=("green",))) == "a green tree"


def test_a_missing_word_is_written_before_the_limit() -> None:
    assert written("abc", options(forced_words=("END",)), limit=10, repeat=True) == "abcabcaEND"


def test_what_is_forced_must_fit_into_the_limit() -> None:
    with pytest.raises(RequestError, match="what is forced has 7 tokens, but the request may generate 6") as caught:
        resolve_words(options(forced_words=("abc", "defg")), CODEC, limit=6)
    assert caught.value.param == "forced_words"


def test_no_ngram_occurs_twice() -> None:
    text = written("abab", options(no_repeat_ngram_size=2), limit=12, repeat=True)
    assert len({text[place : place + 2] for place in range(11)}) == 11


def test_dry_ends_a_loop_and_breakers_protect_their_own() -> None:
    looping = options(dry_multiplier=5.0, dry_sequence_breakers=("b",))
    assert written("abab", looping, limit=8, repeat=True) == "abababab"
    assert written("abab", options(dry_multiplier=5.0), limit=8, repeat=True) != "abababab"


def test_a_scorer_sees_the_tokens_and_changes_the_logits_in_place_or_by_return() -> None:
    seen: list[int] = []

    def in_place(tokens: TokenIds, logits: NDArray[np.float32]) -> None:
        seen.append(tokens.size)
        logits[CODEC.encode("b", special=False)] = -np.inf

    assert written("abc", options(), scorer=in_place) == "azc"
    assert seen == [len(PROMPT) + place for place in range(4)]
    assert written("abc", options(), scorer=lambda tokens, logits: -logits, limit=2) != "ab"


@pytest.mark.parametrize(
    ("returned", "message"), [(np.zeros(3), "returned shape"), (np.full(VOCAB, np.nan), "returned NaN")]
)
def test_what_a_scorer_returns_is_checked(returned: NDArray[np.float32], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        written("abc", options(), scorer=lambda tokens, logits: returned)


def test_options_that_leave_no_token_are_an_error() -> None:
    with pytest.raises(RequestError, match="leave no token to draw, at generated token 1"):
        written("abc", options(), scorer=lambda tokens, logits: np.full_like(logits, -np.inf))
