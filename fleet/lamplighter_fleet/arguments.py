"""What the command lines of this tool have in common."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from lamplighter_agent.errors import ConfigError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a subcommand that ``function`` carries out; ``text`` is its one line of help."""
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--json", action="store_true", help="print for a machine")
    command.set_defaults(run=function)
    return command


def first_line(path: Path) -> str:
    """Return the first line of a file that holds a secret.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def new_passphrase() -> bytes:
    """Ask for a new passphrase, twice.

    Raises:
        ConfigError: If there is no terminal, or the two differ or are empty.
    """
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask for a passphrase on", hint="name a --passphrase-file")
    first = getpass.getpass("Passphrase for the offline keys: ")
    if not first or getpass.getpass("Once more: ") != first:
        raise ConfigError("the two passphrases differ or are empty", hint="run it again")
    return first.encode()
