"""Commands about a package as such: whether it is whole, and what a manifest may hold."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lamplighter_agent.arguments import Commands, add_command
from lamplighter_agent.package.manifest import manifest_schema


def add_commands(commands: Commands) -> None:
    """Add ``verify`` and ``schema``."""
    verify = add_command(commands, "verify", verify_package, "check every file of a package against its manifest")
    verify.add_argument("package", type=Path, help="package directory")
    add_command(commands, "schema", print_schema, "print the JSON Schema of the package manifest")


def verify_package(arguments: argparse.Namespace) -> int:
    """Check a package directory: the manifest's rules, length and sha256 of every file, and that nothing else is there.

    Raises:
        PackageError: Naming the first file that is missing, not listed, or not what the manifest says.
    """
    from lamplighter_agent.update.installed import verify_package as verify

    manifest = verify(arguments.package)
    if arguments.json:
        print(json.dumps({"package": manifest.reference, "files": len(manifest.files), "bytes": manifest.total_bytes}))
        return 0
    for entry in manifest.files:
        print(f"{entry.name:24} {entry.length:>12}  {entry.sha256}  ok")
    print(f"{manifest.reference}: {len(manifest.files)} files, {manifest.total_bytes} bytes, all as in the manifest")
    return 0


def print_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of the manifest."""
    del arguments
    sys.stdout.write(manifest_schema().decode())
    return 0
