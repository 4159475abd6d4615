"""Typed reading of JSON objects that come from outside, such as a checkpoint's ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from lamplighter_agent.errors import CheckpointError

_T = TypeVar("_T", bound=object)


class Fields:
    """Typed reading of a JSON object such as ``config.json``.

    Args:
        values: The object.
        origin: Where it came from, for messages.
    """

    def __init__(self, values: Mapping[str, object], origin: str) -> None:
        self.values, self.origin = values, origin

    def has(self, key: str) -> bool:
        """Tell whether a field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, *, default: int | None = None) -> int:
        """Return a whole number, ``default`` if the field is missing or null.

        Raises:
            CheckpointError: If it is of another type, or missing without a default.
        """
        return self._read(key, int, "a whole number", default)

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number, ``default`` if the field is missing or null.

        Raises:
            CheckpointError: If it is of another type, NaN or infinite, or missing without a default.
        """
        value = self.values.get(key)
        try:
            number = float(value) if type(value) is int else self._read(key, float, "a number", default)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be a finite number")
        return number

    def positive(self, key: str, *, default: float | None = None) -> float:
        """Return a number above zero, ``default`` if the field is missing or null.

        Raises:
            CheckpointError: If it is of another type, not above zero, or missing without a default.
        """
        number = self.number(key, default=default)
        if number <= 0:
            raise CheckpointError(f"{self.origin}: {key} is {number:g}, but must be above zero")
        return number

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a string, ``default`` if the field is missing or null.

        Raises:
            CheckpointError: If it is of another type, or missing without a default.
        """
        return self._read(key, str, "a string", default)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """Return true or false, ``default`` if the field is missing or null.

        Raises:
            CheckpointError: If it is of another type, or missing without a default.
        """
        return self._read(key, bool, "true or false", default)

    def section(self, key: str) -> Fields | None:
        """Return a nested object, or None if it is missing, null or empty.

        Raises:
            CheckpointError: If it is of another type.
        """
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be an object")
        return Fields(value, f"{self.origin}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one token id or a list of them as a tuple, empty if missing or null.

        Raises:
            CheckpointError: If it is anything else.
        """
        value = self.values.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in found):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be a token id or a list of them")
        return tuple(found)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of numbers as a tuple.

        Raises:
            CheckpointError: If it is missing, empty or anything else.
        """
        value = self.values.get(key)
        if not isinstance(value, list) or not value or any(type(item) not in (int, float) for item in value):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be a list of numbers")
        return tuple(float(item) for item in value)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Return a list of strings as a tuple, or None if it is missing or null.

        Raises:
            CheckpointError: If it is anything else.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be a list of strings")
        return tuple(value)

    def _read(self, key: str, kind: type[_T], words: str, default: _T | None) -> _T:
        value = self.values.get(key, default)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.origin}: the field {key!r} is missing")
        # bool is an int for isinstance, but "num_hidden_layers": true is a mistake.
        if type(value) is not kind:
            raise CheckpointError(f"{self.origin}: {key} is {value!r}, but must be {words}")
        return value
