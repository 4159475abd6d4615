"""A text as a vector: the mean of its last hidden states, of unit length.

The model was not trained for this, so that distances say less than those of an embedding model of the same size; texts
on the same thing are near each other all the same.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.events import Event, Finished, FinishReason
from lamplighter_agent.engine.request import Request
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.sequence import Sequence


class EmbeddingSequence(Sequence):
    """A text whose hidden states are summed up chunk by chunk; nothing is generated.

    Args:
        request: The request.
        sampler: Not used.
        hidden_size: Features of a hidden state.
    """

    def __init__(self, request: Request, sampler: Sampler, *, hidden_size: int) -> None:
        super().__init__(request, sampler)
        self._sum: NDArray[np.float64] = np.zeros(hidden_size, dtype=np.float64)

    @property
    def cache_prompt(self) -> bool:
        """False: every token's hidden state is wanted."""
        return False

    def add(self, hidden: NDArray[np.float32]) -> None:
        """Take the hidden states float32 [n, hidden_size] of the next ``n`` tokens."""
        self._sum += hidden.sum(axis=0, dtype=np.float64)

    def finish(self, reason: FinishReason, now: float) -> list[Event]:
        """Return the closing event, with the vector if the whole text was computed."""
        events = super().finish(reason, now)
        if self.in_prefill:
            return events
        length = float(np.linalg.norm(self._sum)) or 1.0
        vector = tuple((self._sum / length).tolist())
        return [
            msgspec.structs.replace(event, embedding=vector) if isinstance(event, Finished) else event
            for event in events
        ]
