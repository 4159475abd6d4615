"""What the doctor says."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found.

    Attributes:
        check: What was looked at.
        level: ``ok``, ``warning`` (it works, or works less well than it could) or ``error`` (it does not work).
        message: What is so.
        advice: What to do, or None.
    """

    check: str
    level: Level
    message: str
    advice: str | None = None


def ok(check: str, message: str) -> Finding:
    """Return that something is well."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, advice: str) -> Finding:
    """Return that something could be better."""
    return Finding(check=check, level="warning", message=message, advice=advice)


def failure(check: str, message: str, advice: str) -> Finding:
    """Return that something does not work."""
    return Finding(check=check, level="error", message=message, advice=advice)
