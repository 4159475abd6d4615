#!/usr/bin/env python3
"""Our client of signed metadata behind the command line that the tuf-conformance suite drives.

    git clone https://github.com/theupdateframework/tuf-conformance && cd tuf-conformance
    sudo apt-get install -y faketime
    export CLIENT="/path/to/.venv/bin/python /path/to/scripts/tuf_client.py"
    /path/to/.venv/bin/pytest tuf_conformance --entrypoint "$CLIENT"

Every test of the suite is expected to pass (113 with version 2.4.0): there are no expected failures to list.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lamplighter_agent.errors import LamplighterError, UnknownPackageError
from lamplighter_agent.update.downloader import Downloader, DownloadOptions, HttpSource
from lamplighter_agent.update.sources import SourceStream
from lamplighter_agent.update.trust import TrustedRepository

MAX_TARGET_BYTES = 64 * 1024 * 1024


class TwoAddresses:
    """A repository whose metadata and targets lie at addresses of their own."""

    def __init__(self, metadata_url: str, targets_url: str | None) -> None:
        self._metadata = HttpSource(metadata_url)
        self._targets = HttpSource(targets_url) if targets_url else None

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str | None = None) -> Iterator[SourceStream]:
        """Open a file; see ``Source.open``."""
        source, rest = self._place(path)
        with source.open(rest, offset=offset, etag=etag) as stream:
            yield stream

    def describe(self, path: str) -> str:
        """Return the file's URL."""
        source, rest = self._place(path)
        return source.describe(rest)

    def _place(self, path: str) -> tuple[HttpSource, str]:
        kind, _, rest = path.partition("/")
        return (self._targets if kind == "targets" and self._targets else self._metadata), rest


def main() -> int:
    """Run one command of the suite; 0 if it succeeded fully."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--metadata-dir", "--metadata-url", "--target-dir", "--target-base-url"):
        parser.add_argument(name)
    parser.add_argument("--target-name", action="append", default=[])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    arguments = parser.parse_args()
    metadata_dir = Path(arguments.metadata_dir)
    if arguments.command == "init":
        (metadata_dir / "root.json").write_bytes(arguments.root.read_bytes())
        return 0
    with TemporaryDirectory() as scratch:
        repository = TrustedRepository(
            Downloader(TwoAddresses(arguments.metadata_url, arguments.target_base_url), DownloadOptions(retries=0)),
            root=(metadata_dir / "root.json").read_bytes(),
            metadata_dir=metadata_dir,
            scratch_dir=Path(scratch) / "metadata",
        )
        try:
            repository.check()
            for name in arguments.target_name:
                download(repository, name, Path(arguments.target_dir))
        except LamplighterError as error:
            print(f"{type(error).__name__}: {error.diagnostics()}", file=sys.stderr)
            return 1
        finally:
            show_root(metadata_dir)
    return 0


def download(repository: TrustedRepository, name: str, directory: Path) -> None:
    """Put a target where the suite looks for it."""
    place = directory / hashlib.sha256(name.encode()).hexdigest()
    known = place.read_bytes() if place.exists() else None
    signed = repository.fetch(name, MAX_TARGET_BYTES, known=known)
    if signed is None:
        raise UnknownPackageError(f"{name} is not signed")
    if signed.data != known:
        place.write_bytes(signed.data)


def show_root(metadata_dir: Path) -> None:
    """Show the newest trusted root under the name that the suite reads; ours keeps every version."""
    roots = sorted((metadata_dir / "root_history").glob("*.root.json"), key=lambda path: int(path.name.split(".")[0]))
    if roots:
        (metadata_dir / "root.json").write_bytes(roots[-1].read_bytes())


if __name__ == "__main__":
    sys.exit(main())
