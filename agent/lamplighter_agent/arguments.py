"""What the rooms' command lines have in common: how a subcommand is added, and how figures are shown."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
MIB: Final = 1024 * 1024


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a subcommand that ``function`` carries out; ``text`` is its one line of help."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--json", action="store_true", help="print for a machine")
    command.set_defaults(run=function)
    return command


def shown(name: str, value: object) -> str:
    """Return a figure with its unit as a person reads it; the unit is the end of its name."""
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value / MIB:.0f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
