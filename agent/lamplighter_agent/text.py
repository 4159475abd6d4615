"""Text of unknown origin, made fit for what it is shown or written in."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with every character replaced that a terminal, a log or UTF-8 could stumble over."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
