"""What is wrong with JSON that was refused, in words for its sender: short, printable, and with the field it is about.

What msgspec says repeats names of any length and with any characters, counts bytes within one string, and calls half of
a surrogate pair a truncation. The sentence goes into an answer and into the log, so that it must not be its sender's.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from lamplighter_agent.text import printable

MAX_NAME: Final = 64
_MAX_TEXT: Final = 300
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MISSING_FIELD: Final = re.compile(r"missing required field `(\w+)`")
_AT_PATH: Final = re.compile(r"at `\$\.?(\w+)")
_MALFORMED: Final = re.compile(r"JSON is malformed: (.*) \(byte (\d+)\)")
_HALF_PAIR: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_NO_NUMBERS: Final = (b"NaN", b"Infinity", b"-Infinity", b"nan", b"inf")


class JsonFault(NamedTuple):
    """What is wrong, and the outermost field that it is about."""

    text: str
    param: str | None = None


def explain(error: Exception, data: bytes) -> JsonFault:
    """Return in words what msgspec raised for ``data``."""
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(data)
    if isinstance(error, RecursionError):
        return JsonFault("it is nested too deeply")
    text = str(error)
    if not data.strip():
        return JsonFault("it is empty")
    if "surrogate" in text or ("truncated" in text and _HALF_PAIR.search(data)):
        return JsonFault("a \\u escape is half of a surrogate pair, which is no character")
    if found := _MALFORMED.search(text):
        at = int(found[2])
        if data[at:].startswith(_NO_NUMBERS):
            return JsonFault(f"JSON has neither NaN nor infinity (byte {at})")
        return JsonFault(f"{found[1]} at byte {at}")
    if found := _UNKNOWN_FIELD.search(text):
        name = found[1][:MAX_NAME]
        return JsonFault(f"the field {name!r} is not known", printable(name))
    at_path = _AT_PATH.search(text)
    param = at_path[1][:MAX_NAME] if at_path else None
    if found := _MISSING_FIELD.search(text):
        param = param or found[1]
    return JsonFault(printable(text)[:_MAX_TEXT], param)


def _not_utf8(data: bytes) -> JsonFault:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return JsonFault(f"it is not UTF-8 text: {error.reason} at byte {error.start}")
    return JsonFault("it is not UTF-8 text")
