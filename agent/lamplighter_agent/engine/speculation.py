"""Prompt-lookup speculation: guess the next tokens from a place where the text was the same before.

Texts that quote their prompt (summaries, JSON from a document, edited code) repeat long runs of tokens. A draft costs
no model of its own; verifying it costs one step of several rows, which is less than as many steps. Whether that pays is
measured: the cost of a step by its rows, and how often drafts after a match of some length come true, which is counted
for every token, drafted or not. Where it does not pay nothing is drafted.

Nothing here can change a text: every token is drawn by the request's own sampler from the logits of a decode step, and
a draft is used as far as it agrees.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_ROWS: Final = 8
"""Most tokens verified in a step, the one before the draft included."""

WIDTHS: Final = (2, 3, 4, 6, 8)
"""Rows of a step that are chosen from: each has a cost and a proof of exactness of its own."""

_MATCH_TOKENS: Final = (6, 3, 2)
"""Lengths of the beginnings that are looked up, longest first."""

_MAX_MATCH: Final = 32
_CLASSES: Final = (3, 6, 12)
"""Matches shorter than the first number, than the second … are alike likely to go on."""

_PRIOR_WEIGHT: Final = 4.0
_MEMORY: Final = 1.0 / 24
"""Weight of the newest observation of a cost or a likelihood."""

_FORGETTING: Final = 1.0 / 256

_ASSUMED_ROW_COST: Final = 0.45
"""Cost of another row relative to a plain step, until it is measured."""

_MIN_GAIN: Final = 1.03


class Draft(NamedTuple):
    """Tokens that may come next, and how many tokens before them agree with their source."""

    tokens: list[int]
    match: int


class NgramIndex:
    """Finds the latest earlier place of a text that ends as the text does now.

    Args:
        tokens: The text so far; ``extend`` adds to it.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        # By the tokens that end there: the place behind them. The newest place is entered when the next token comes, so
        # that a text never finds itself.
        self._places: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in _MATCH_TOKENS)
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens to the text."""
        text = self._tokens
        for token in tokens:
            length = len(text)
            for size, places in zip(_MATCH_TOKENS, self._places, strict=True):
                if length >= size:
                    places[tuple(text[length - size :])] = length
            text.append(token)

    def draft(self, most: int) -> Draft:
        """Return up to ``most`` tokens that followed the last tokens before; none if they are new."""
        text = self._tokens
        for size, places in zip(_MATCH_TOKENS, self._places, strict=True):
            place = places.get(tuple(text[-size:])) if len(text) >= size else None
            if place is not None:
                return Draft(text[place : place + most], self._match(place, size))
        return Draft([], 0)

    def _match(self, place: int, known: int) -> int:
        text, end = self._tokens, len(self._tokens)
        match = known
        while match < min(place, _MAX_MATCH) and text[place - 1 - match] == text[end - 1 - match]:
            match += 1
        return match


class StepCosts:
    """Seconds of a step by its rows: a running mean, one for the engine.

    Until a number of rows was measured its cost is that of one row, plus a share for each further row.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Take in a measured step."""
        known = self._seconds.get(rows, seconds)
        # A step that another process held up says little about rows.
        self._seconds[rows] = known + (min(seconds, 3 * known) - known) * _MEMORY
        if rows == 1:
            self._forget_excess(self._seconds[1])

    def relative(self, rows: int) -> float:
        """Return the cost of a step of ``rows`` rows in plain steps."""
        plain, several = self._seconds.get(1), self._seconds.get(rows)
        return several / plain if plain and several else _assumed_cost(rows)

    def _forget_excess(self, plain: float) -> None:
        """Let costs that seem too high sink slowly: a number of rows that is not used is not measured either."""
        for rows, seconds in self._seconds.items():
            excess = seconds - plain * _assumed_cost(rows)
            if excess > 0 and rows > 1:
                self._seconds[rows] -= excess * _FORGETTING


class Speculator:
    """Drafts for one request.

    Args:
        prompt: Its prompt's token ids.
        costs: What steps cost here.
    """

    def __init__(self, prompt: list[int], costs: StepCosts) -> None:
        self._index = NgramIndex(prompt)
        self._costs = costs
        # Likelihood that the next token follows the source, by the length of the match: (came true, seen).
        self._seen = [[0.5 * _PRIOR_WEIGHT + share, _PRIOR_WEIGHT] for share in (-1.0, 0.0, 1.0, 1.6)]
        self._next: Draft | None = None

    def draft(self, most: int, usable: tuple[int, ...] = WIDTHS) -> list[int]:
        """Return the tokens to verify behind the last one, [] for a plain step.

        Args:
            most: Tokens that may be drafted.
            usable: Rows that a step may have.
        """
        self._next = self._index.draft(MAX_ROWS - 1)
        found = len(self._next.tokens)
        expected, likely, best, best_gain = 1.0, 1.0, 0, _MIN_GAIN
        for count in range(1, min(found, most) + 1):
            likely *= self._likelihood(self._next.match + count - 1)
            expected += likely
            if count + 1 in usable:
                gain = expected / self._costs.relative(count + 1)
                if gain > best_gain:
                    best, best_gain = count, gain
        return self._next.tokens[:best]

    def note(self, tokens: list[int]) -> None:
        """Take in the tokens that were drawn after ``draft``: one, and one more for each guess that came true."""
        guess, self._next = self._next, None
        if guess is not None:
            for agreed, (token, guessed) in enumerate(zip(tokens, guess.tokens, strict=False)):
                self._learn(guess.match + agreed, came_true=token == guessed)
                if token != guessed:
                    break
        self._index.extend(tokens)

    def _likelihood(self, match: int) -> float:
        true, seen = self._seen[_class_of(match)]
        return true / seen

    def _learn(self, match: int, *, came_true: bool) -> None:
        counts = self._seen[_class_of(match)]
        counts[0] += came_true
        counts[1] += 1.0
        if counts[1] > 1 / _MEMORY:
            counts[0] *= 0.5
            counts[1] *= 0.5


def _assumed_cost(rows: int) -> float:
    return 1.0 + _ASSUMED_ROW_COST * (rows - 1)


def _class_of(match: int) -> int:
    for index, bound in enumerate(_CLASSES):
        if match < bound:
            return index
    return len(_CLASSES)
