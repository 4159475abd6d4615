"""What a sender is told about JSON that cannot be read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lamplighter_agent.service.json_faults import MAX_NAME, explain


class Example(msgspec.Struct, forbid_unknown_fields=True):
    text: str
    number: float = 0.0
    inner: dict[str, Any] | None = None


@pytest.mark.parametrize(
    ("data", "text", "param"),
    [
        (b"", "it is empty", None),
        (b" \n", "it is empty", None),
        (b'{"text": "a', "Input data was truncated", None),
        (b'{"text": "\xff"}', "it is not UTF-8 text: invalid start byte at byte 10", None),
        (b'{"text": "\\ud800"}', "a \\u escape is half of a surrogate pair, which is no character", None),
        (b'{"text": "\\ud83d and more, at some length"}', "a \\u escape is half of a surrogate pair", None),
        (b'{"text": "\\ude00"}', "a \\u escape is half of a surrogate pair, which is no character", None),
        (b'{"text": "a", "number": NaN}', "JSON has neither NaN nor infinity (byte 24)", None),
        (b'{"text": "a", "number": -Infinity}', "JSON has neither NaN nor infinity (byte 25)", None),
        (b'{"text": "a", "number": 1e999}', "Number out of range - at `$.number`", "number"),
        (b'{"text": "a"} more', "trailing characters at byte 15", None),
        (b'{"text": 1}', "Expected `str`, got `int` - at `$.text`", "text"),
        (b"{}", "Object missing required field `text`", "text"),
        (b'{"text": "a", "other\\n": 1}', "the field 'other\\n' is not known", "other\N{REPLACEMENT CHARACTER}"),
        (b'{"text": "a", "inner": ' + b'{"a":' * 5000, "it is nested too deeply", None),
        (b'{"text": "a", "' + b"k" * 5000 + b'": 1}', f"the field '{'k' * MAX_NAME}' is not known", "k" * MAX_NAME),
    ],
)
def test_what_is_wrong_is_told(data: bytes, text: str, param: str | None) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, RecursionError)) as caught:
        msgspec.json.decode(data, type=Example)
    fault = explain(caught.value, data)
    assert (fault.text[: len(text)], fault.param) == (text, param)
    assert fault.text.isprintable()
