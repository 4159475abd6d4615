"""What a grammar may ask for before the grammar engine sees it: work that the engine's own limits do not cover.

Pure: the grammar is read as data. What is refused here is rare in honest grammars, so the rules are coarse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final

import msgspec

from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError

MAX_REMAINDERS: Final = 10_000
"""A multiple of n is an automaton of n states; that of two conditions at once has their least common multiple."""

MAX_INTERSECTED: Final = 1_000
"""Repetitions, nested ones multiplied, in a Lark grammar with ``&`` or ``~``, and half its characters."""

_REPETITION: Final = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
_EMBEDDED: Final = re.compile(r"%json\s*")


def json_schema(given: object) -> dict[str, Any]:
    """Return a schema that is given as an object or as its text.

    Raises:
        RequestError: If it is no object.
        msgspec.DecodeError: If the text is no JSON.
    """
    schema = msgspec.json.decode(given) if isinstance(given, str) else given
    if not isinstance(schema, dict):
        raise RequestError("guided_json must be a JSON Schema, an object", param="guided_json")
    return schema


def check_work(params: GenerationParams) -> None:
    """Refuse a grammar that would take too long to compile.

    Raises:
        RequestError: Naming the option and the bound.
    """
    if params.guided_grammar is not None:
        _check_intersections(params.guided_grammar)
        for schema in _embedded_schemas(params.guided_grammar):
            _check_multiples(schema, "guided_grammar")
    elif params.guided_json is not None:
        try:
            _check_multiples(json_schema(params.guided_json), "guided_json")
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"guided_json cannot be read: {error}", param="guided_json") from error


def _check_multiples(schema: object, option: str) -> None:
    values = [value for value in _multiples(schema) if value > 0]
    together = math.lcm(*{_states(value) for value in values})
    if together > MAX_REMAINDERS or sum(map(_states, values)) > 2 * MAX_REMAINDERS:
        raise RequestError(
            f"{option}: multipleOf comes to more than {MAX_REMAINDERS} remainders, all of them together",
            param=option,
            hint="leave multipleOf out, or check the answer for it",
        )


def _states(value: Fraction) -> int:
    """Return the remainders to tell apart: those of the digits without the point."""
    digits = value
    while digits.denominator != 1:
        digits *= 10
    return int(digits)


def _multiples(schema: object) -> Iterator[Fraction]:
    """Yield every ``multipleOf``, wherever it stands."""
    waiting: list[Any] = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            value = item.get("multipleOf")
            # True is an integer to Python, and one of a thousand digits no float.
            if isinstance(value, int) and not isinstance(value, bool):
                yield Fraction(value)
            elif isinstance(value, float) and math.isfinite(value):
                yield Fraction(str(value))
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _embedded_schemas(grammar: str) -> Iterator[object]:
    for found in _EMBEDDED.finditer(grammar):
        try:
            yield json.JSONDecoder().raw_decode(grammar, found.end())[0]
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"guided_grammar: %json is not followed by JSON: {error}", param="guided_grammar"
            ) from error


def _check_intersections(grammar: str) -> None:
    if "&" not in grammar and "~" not in grammar:
        return
    repeated = math.prod(
        max(1, *(int(number) for number in found.groups() if number)) for found in _REPETITION.finditer(grammar)
    )
    if max(repeated, len(grammar) // 2) > MAX_INTERSECTED:
        raise RequestError(
            f"guided_grammar intersects or negates with {repeated} repetitions in {len(grammar)} characters, "
            f"but may have {MAX_INTERSECTED} and {2 * MAX_INTERSECTED}",
            param="guided_grammar",
            hint="leave & and ~ out, or repeat less",
        )
