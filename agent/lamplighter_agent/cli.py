"""The command line: the rooms' subcommands, and one place where errors become messages and exit codes.

Modules that bring heavy libraries are imported by the subcommand that needs them, so that the rest starts at once and
``run``, which lives for months, never loads the inference runtime into its own process.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

import lamplighter_agent.engine.cli
import lamplighter_agent.service.cli
import lamplighter_agent.update.cli
from lamplighter_agent import __version__
from lamplighter_agent.errors import LamplighterError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        code: int = arguments.run(arguments)
    except LamplighterError as error:
        if arguments.json:
            print(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        print(f"lamplighter-agent: {error.diagnostics()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more; keep the interpreter from complaining at exit
        return 1
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="lamplighter-agent", description="Run a language-model package on this box.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lamplighter_agent.service.cli.add_commands(commands)
    lamplighter_agent.engine.cli.add_commands(commands)
    lamplighter_agent.update.cli.add_commands(commands)
    return parser
