"""What devices say, made fit for a terminal: nothing in it acts on the terminal, forges a line, or has no end.

A device may be in wrong hands, and any client that the broker lets publish may speak for it. Escape sequences in a name
or an answer could wipe the screen, rename the window or show lines that no tool wrote.
"""

from __future__ import annotations

import json
import re
from typing import Final

from lamplighter_agent.errors import RequestError
from lamplighter_agent.service.messages import ErrorReply

MAX_LINE: Final = 500
# Controls of both kinds, what turns the direction of writing, line and paragraph separators, and tags that nobody sees.
_ACTING: Final = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f"
_IN_TEXT: Final = re.compile(f"[{_ACTING}\ud800-\udfff]")
_IN_LINE: Final = re.compile(f"[\t\n{_ACTING}\ud800-\udfff]")


def plain(text: str, most: int = MAX_LINE) -> str:
    """Return text as a part of one line, of at most ``most`` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
    return _IN_LINE.sub("\N{REPLACEMENT CHARACTER}", cut)


def prose(text: str) -> str:
    """Return text of any length that keeps its lines and tabs."""
    return _IN_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def safe_json(text: str) -> str:
    """Return JSON with the same meaning in which everything that could act on a terminal is escaped."""
    return _IN_TEXT.sub(lambda found: json.dumps(found[0])[1:-1], text)


def refusal(reply: ErrorReply) -> RequestError:
    """Return a device's error as one of our own."""
    return RequestError(
        plain(reply.message),
        code=reply.code,
        param=None if reply.param is None else plain(reply.param),
        retry_after_s=reply.retry_after_s,
        hint=None if reply.hint is None else plain(reply.hint),
    )
