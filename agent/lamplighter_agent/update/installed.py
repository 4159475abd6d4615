"""A package directory: reading its manifest and checking its files, wherever on the disk it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.durable import storage_errors
from lamplighter_agent.package.hashing import verify_file
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.package.manifest import Manifest, read_manifest
from lamplighter_agent.package.onnx_scan import KNOWN_DOMAINS, check_graph
from lamplighter_agent.update.states import PackageRef


@dataclass(frozen=True, slots=True)
class InstalledPackage:
    """A package directory of the store.

    Attributes:
        reference: Its name and version.
        path: Its real directory, not the ``current`` link.
        manifest: Its decoded manifest.
    """

    reference: PackageRef
    path: Path
    manifest: Manifest


def verify_package(directory: Path) -> Manifest:
    """Check a package directory anywhere on the disk against its own manifest, and that nothing else lies in it.

    Raises:
        ManifestError: If the manifest is missing or not valid, or a file is not listed in it.
        MissingFileError: If a listed file is not there.
        HashMismatchError: If a file is not as listed.
        GraphError: If the graph asks for something that no package may ask for.
        StoreError: If the disk fails.
    """
    with storage_errors(f"reading {directory}"):
        manifest = read_manifest(directory)
        for entry in manifest.files:
            verify_file(directory / entry.name, entry)
        names = frozenset(entry.name for entry in manifest.files)
        check_graph(directory / manifest.file("model").name, KNOWN_DOMAINS, names)
        listed = {MANIFEST_NAME, *names}
        for path in sorted(directory.iterdir()):
            if path.name not in listed:
                raise ManifestError(f"{path}: the manifest does not list this file")
    return manifest


def regular_size(path: Path) -> int | None:
    """Return the length of a regular file, None for anything else."""
    try:
        return path.stat(follow_symlinks=False).st_size if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None
