"""Downgrades: a version lower than one that has served well here is refused unless its signers permit it.

The fleet chooses among signed packages, and an old one with a known fault is signed too. So the permission must come
from those who sign packages, not from those who tell devices what to run.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from lamplighter_agent.errors import MetadataError, RollbackError
from lamplighter_agent.update.states import PackageRef

_PARTS = re.compile(r"\d+|[A-Za-z]+", re.ASCII)
_TEXT, _END, _NUMBER = 0, 1, 2


class DowngradePermission(msgspec.Struct, frozen=True, kw_only=True):
    """Part of the signed entry of a package's manifest.

    Attributes:
        replaces: Higher versions that this one may replace.
    """

    replaces: Annotated[tuple[str, ...], Meta(max_length=256)] = ()


class _Custom(msgspec.Struct, frozen=True, kw_only=True):
    lamplighter: DowngradePermission = DowngradePermission()


def read_permission(custom: object) -> DowngradePermission:
    """Read what the signers said about a package; nothing is no permission.

    Raises:
        MetadataError: If it is not what it should be.
    """
    if custom is None:
        return DowngradePermission()
    try:
        return msgspec.convert(custom, _Custom).lamplighter
    except msgspec.ValidationError as error:
        raise MetadataError(f"targets.json: the custom part of a package is not valid: {error}") from error


def check_downgrade(wanted: PackageRef, highest: str | None, permission: DowngradePermission) -> None:
    """Check that a version may be installed.

    Args:
        wanted: The package.
        highest: Highest version of that name that has served here, or None.
        permission: What its signers permit.

    Raises:
        RollbackError: If it is lower and there is no permission.
    """
    if highest is None or version_key(wanted.version) >= version_key(highest) or highest in permission.replaces:
        return
    raise RollbackError(
        f"{wanted} is older than {wanted.name}/{highest}, which has served on this device",
        hint=f"if that is wanted, sign a permission: lamplighter-fleet allow-downgrade {wanted} --from {highest}",
    )


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that orders versions: numbers as numbers, and text below nothing, as 1.0.0-rc1 is before 1.0.0."""
    parts = _PARTS.findall(version)
    key = [(_NUMBER, int(part), "") if part.isdigit() else (_TEXT, 0, part.lower()) for part in parts]
    return (*key, (_END, 0, ""))
