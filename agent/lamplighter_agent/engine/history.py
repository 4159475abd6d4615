"""The tokens that a request's rules look back on: prompt and generated text, in one growing array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]

_ROOM_TOKENS = 256


class History:
    """Token ids of one request, in order.

    Args:
        prompt: Token ids of the prompt.

    Attributes:
        prompt_tokens: How many of the tokens are the prompt's.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_tokens = len(prompt)
        self._length = len(prompt)
        self._buffer: TokenIds = np.empty(len(prompt) + _ROOM_TOKENS, dtype=np.int64)
        self._buffer[: len(prompt)] = prompt
        self._counts: Counter[int] = Counter()
        self._seen: set[int] | None = None
        self._seen_ids: TokenIds = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> TokenIds:
        """All tokens, int64 [n]; a view that is valid until the next change."""
        return self._buffer[: self._length]

    @property
    def generated(self) -> int:
        """Tokens behind the prompt."""
        return self._length - self.prompt_tokens

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        if self._length == self._buffer.size:
            self._buffer = np.concatenate((self._buffer, np.empty(self._buffer.size, dtype=np.int64)))
        self._buffer[self._length] = token_id
        self._length += 1
        self._counts[token_id] += 1
        if self._seen is not None and token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids = np.append(self._seen_ids, token_id)

    def extend_prompt(self, tokens: Sequence[int]) -> None:
        """Add tokens that the caller gave; everything up to here counts as prompt from now on."""
        self._reset(np.concatenate((self.tokens, np.asarray(tokens, dtype=np.int64))))
        self.prompt_tokens = self._length

    def rewind(self, length: int) -> None:
        """Forget all tokens behind the first ``length``."""
        self._reset(self.tokens[:length])
        self.prompt_tokens = min(self.prompt_tokens, length)

    def copy(self) -> History:
        """Return a history of its own with the same tokens."""
        twin = History(self.tokens[: self.prompt_tokens].tolist())
        for token_id in self.tokens[self.prompt_tokens :].tolist():
            twin.append(token_id)
        return twin

    def seen(self) -> TokenIds:
        """Return the different tokens of prompt and text, int64 [n], in any order."""
        if self._seen is None:
            self._seen_ids = np.unique(self.tokens)
            self._seen = set(self._seen_ids.tolist())
        return self._seen_ids

    def counts(self) -> tuple[TokenIds, NDArray[np.float32]]:
        """Return the different generated tokens, int64 [n], and how often each was generated, float32 [n]."""
        size = len(self._counts)
        return (
            np.fromiter(self._counts.keys(), dtype=np.int64, count=size),
            np.fromiter(self._counts.values(), dtype=np.float32, count=size),
        )

    def _reset(self, tokens: TokenIds) -> None:
        self._length = tokens.size
        self._buffer = np.concatenate((tokens, np.empty(_ROOM_TOKENS, dtype=np.int64)))
        self._counts = Counter(tokens[self.prompt_tokens :].tolist())
        self._seen = None
