"""The packages on this device, and which one is in use.

Layout of the state directory::

    metadata/                      trusted metadata (update/trust.py)
    blobs/SHA256                   files of packages by content; SHA256.part while they are being fetched
    packages/NAME/VERSION/         one real directory a package: manifest.json and hard links to blobs
    current -> packages/…          the package in use: one symbolic link, replaced in one atomic step
    previous -> packages/…         where a rollback goes
    prepared/NAME-VERSION-…/       derived by the engine, may be removed at any time
    staging/                       work in progress and rubbish; nothing in it is ever trusted

A package directory appears by a rename when all of it is there and durable, and leaves by a rename. So every state
that a crash can leave is one from which every operation here can be run again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamplighter_agent.errors import (
    HashMismatchError,
    ManifestError,
    MissingFileError,
    PackageError,
    StoreError,
    UnknownPackageError,
)
from lamplighter_agent.package.durable import (
    make_directory,
    move,
    remove_directory,
    storage_errors,
    sync_directory,
    write_file,
)
from lamplighter_agent.package.hashing import verify_file
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.package.manifest import Manifest, decode_manifest, read_manifest, read_manifest_bytes
from lamplighter_agent.update.blobs import BlobStore
from lamplighter_agent.update.installed import InstalledPackage, regular_size
from lamplighter_agent.update.links import PackageLink
from lamplighter_agent.update.states import PackageRef


class Store:
    """The state directory's packages.

    Reading needs no lock. What changes the store is called with `lock` held, once in all processes.

    Args:
        root: The state directory; it is created when first needed.
        reserve_bytes: Free space that a download must leave to the rest of the device.
    """

    def __init__(self, root: Path, *, reserve_bytes: int = 64 * 1024 * 1024) -> None:
        self.root = root
        self.metadata_dir = root / "metadata"
        self.blobs = BlobStore(root / "blobs", reserve_bytes=reserve_bytes)
        self.packages_dir = root / "packages"
        self.prepared_dir = root / "prepared"
        self.staging_dir = root / "staging"
        self._current = PackageLink(root / "current")
        self._previous = PackageLink(root / "previous")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to change the store; the directories exist inside.

        Raises:
            StoreError: If another process, or another update of this one, holds it, or the store is not writable.
        """
        with storage_errors(f"opening the store in {self.root}"):
            for directory in (self.blobs.directory, self.packages_dir, self.prepared_dir, self.staging_dir):
                make_directory(directory)
            # Read-only, so that a disk that takes no writes any more does not keep the service from going back.
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"{self.root}: another update is at work on this store",
                    hint="wait until it is done, or cancel it",
                ) from error
            yield
        finally:
            os.close(descriptor)

    def current(self) -> InstalledPackage | None:
        """Return the package in use, or None before the first activation.

        Raises:
            StoreError: If the link leads elsewhere than to a package of this store.
            ManifestError: If its manifest cannot be read.
        """
        return self._linked(self._current)

    def previous(self) -> InstalledPackage | None:
        """Return the package that `roll_back` goes to, or None.

        Raises:
            StoreError: If the link leads elsewhere than to a package of this store.
            ManifestError: If its manifest cannot be read.
        """
        package = self._linked(self._previous)
        current = self._current.target()
        # A crash between the two steps of an activation leaves both links at the same package.
        return None if package is None or package.reference == current else package

    def installed(self) -> tuple[PackageRef, ...]:
        """Return every package whose directory is in the store, sorted."""
        found = []
        for manifest in self.packages_dir.glob(f"*/*/{MANIFEST_NAME}"):
            try:
                found.append(PackageRef(manifest.parent.parent.name, manifest.parent.name))
            except ManifestError:
                continue
        return tuple(sorted(found))

    def newest(self, count: int) -> tuple[PackageRef, ...]:
        """Return the ``count`` packages that came last, without the one in use."""
        current = self._current.target()
        others = [reference for reference in self.installed() if reference != current]
        others.sort(key=lambda reference: self._package_dir(reference).stat().st_mtime_ns, reverse=True)
        return tuple(others[:count])

    def package(self, reference: PackageRef) -> InstalledPackage:
        """Return an installed package.

        Raises:
            UnknownPackageError: If it is not in the store.
            ManifestError: If its manifest cannot be read, or is another package's.
            StoreError: If the disk fails.
        """
        path = self._package_dir(reference)
        with storage_errors(f"reading {path}"):
            if not path.is_dir():
                raise UnknownPackageError(
                    f"{reference} is not installed in {self.root}",
                    hint="installed: " + (", ".join(map(str, self.installed())) or "nothing"),
                )
        manifest = read_manifest(path)
        if manifest.reference != str(reference):
            raise ManifestError(f"{path / MANIFEST_NAME}: describes {manifest.reference}, not {reference}")
        return InstalledPackage(reference, path, manifest)

    def verify(self, package: InstalledPackage, *, only: Collection[str] | None = None) -> None:
        """Check files of an installed package against its manifest.

        Args:
            package: What to check.
            only: Names of the files to check, or None for all.

        Raises:
            MissingFileError: Naming the file.
            HashMismatchError: Naming the file and both values.
            StoreError: If the disk fails.
        """
        for entry in package.manifest.files:
            if only is None or entry.name in only:
                with storage_errors(f"reading {package.path / entry.name}"):
                    verify_file(package.path / entry.name, entry)

    def stage(self, manifest_bytes: bytes) -> InstalledPackage:
        """Make the package directory from blobs that are all in the store; one that is complete is kept.

        Args:
            manifest_bytes: The signed manifest.

        Raises:
            ManifestError: If the manifest is not valid.
            MissingFileError: If a blob is not in the store.
            StoreError: If the file system refuses, or the package in use has that name but another manifest.
        """
        manifest = decode_manifest(manifest_bytes)
        reference = PackageRef(manifest.name, manifest.version)
        path = self._package_dir(reference)
        with storage_errors(f"staging {reference} in {self.root}"):
            if regular_size(path / MANIFEST_NAME) is not None and read_manifest_bytes(path) != manifest_bytes:
                self.discard(reference)
            if path.is_dir():
                self._relink(path, manifest)
            else:
                self._build(path, manifest, manifest_bytes)
        return InstalledPackage(reference, path, manifest)

    def activate(self, reference: PackageRef) -> None:
        """Make an installed package the one in use; the one before becomes the previous one.

        Raises:
            UnknownPackageError: If it is not in the store.
            StoreError: If the file system refuses; the package in use is then as before.
        """
        self.package(reference)
        before = self._current.target()
        if before == reference:
            return
        with storage_errors(f"activating {reference}"):
            if before is not None:
                self._previous.point(before)
            self._current.point(reference)

    def roll_back(self) -> InstalledPackage:
        """Make the previous package, verified, the one in use again; afterwards there is no previous one.

        Raises:
            UnknownPackageError: If there is no previous package.
            MissingFileError: If a file of it is missing.
            HashMismatchError: If a file of it is damaged.
            StoreError: If the file system refuses.
        """
        package = self.previous()
        if package is None:
            raise UnknownPackageError(f"{self.root}: there is no previous package to roll back to")
        self.verify(package)
        self.return_to(package.reference)
        return package

    def return_to(self, reference: PackageRef | None) -> None:
        """Undo an activation: the package in use is again the one before, or none; there is no previous one.

        Raises:
            StoreError: If the file system refuses.
        """
        with storage_errors(f"returning to {reference or 'no package'}"):
            self._current.make_way(self.staging_dir / "removed-current")
            if reference is None:
                self._current.remove()
            else:
                self._current.point(reference)
            self._previous.remove()

    def drop_previous(self) -> None:
        """Give up the package that a rollback would go to, for its space; without one, do nothing.

        Raises:
            StoreError: If the file system refuses.
        """
        reference = self._previous.target()
        if reference is not None and reference != self._current.target():
            self.discard(reference)

    def in_use(self) -> PackageRef | None:
        """Return what `current` names, whether or not it is there; None if it names nothing or is damaged."""
        try:
            return self._current.target()
        except StoreError:
            return None

    def previous_reference(self) -> PackageRef | None:
        """Return what `previous` names, whether or not it is there; None if it names nothing or is damaged."""
        try:
            return self._previous.target()
        except StoreError:
            return None

    def has_current_entry(self) -> bool:
        """Return whether there is anything, be it damaged, at the place of `current`."""
        return os.path.lexists(self.root / "current")

    def is_complete(self, reference: PackageRef) -> bool:
        """Return whether a package can be read and its files have their lengths: quick, but no proof."""
        try:
            package = self.package(reference)
        except (PackageError, StoreError):
            return False
        return all(regular_size(package.path / entry.name) == entry.length for entry in package.manifest.files)

    def is_whole(self, reference: PackageRef) -> bool:
        """Return whether a package can be read and every file is as its manifest says."""
        try:
            self.verify(self.package(reference))
        except (PackageError, StoreError):
            return False
        return True

    def discard(self, reference: PackageRef) -> None:
        """Remove an installed package that is not in use; its blobs stay until `prune`.

        Raises:
            StoreError: If it is in use, or the file system refuses.
        """
        if reference == self._current.target():
            raise StoreError(f"{reference} is in use and cannot be removed")
        with storage_errors(f"removing {reference}"):
            if reference == self._previous.target():
                self._previous.remove()
            remove_directory(self._package_dir(reference), self.staging_dir / "removed-package")

    def discard_bad_files(self, package: InstalledPackage) -> tuple[str, ...]:
        """Take every file out of a staged package, and its blob out of the store, that is not as signed.

        Returns:
            The names of those files. `BlobStore.missing` then lists them, and `stage` links them anew.

        Raises:
            StoreError: If the file system refuses.
        """
        bad = []
        for entry in package.manifest.files:
            try:
                self.verify(package, only={entry.name})
            except (MissingFileError, HashMismatchError):
                bad.append(entry.name)
                self.blobs.discard(entry)
        return tuple(bad)

    def prune(self, keep: Collection[PackageRef] = (), *, keep_blobs_of: Manifest | None = None) -> None:
        """Remove packages, blobs and prepared weights that nothing needs.

        Args:
            keep: Packages that stay besides the one in use and the previous one.
            keep_blobs_of: A package whose blobs stay although it is not staged yet.

        Raises:
            StoreError: If the file system refuses.
        """
        kept = {*keep, self._current.target(), self._previous.target()}
        for reference in self.installed():
            if reference not in kept:
                self.discard(reference)
        wanted = {entry.sha256 for entry in keep_blobs_of.files} if keep_blobs_of else set()
        prefixes = tuple(f"{reference.name}-{reference.version}-" for reference in kept if reference is not None)
        with storage_errors(f"pruning {self.root}"):
            self.blobs.remove_unused(wanted)
            for prepared in _children(self.prepared_dir):
                if not prepared.name.startswith(prefixes):
                    remove_directory(prepared, self.staging_dir / "removed-prepared")
            for directory in _children(self.packages_dir):
                if not _children(directory):
                    directory.rmdir()
            for rubbish in _children(self.staging_dir):
                if rubbish.name.startswith(("package-", "removed-")):
                    remove_directory(rubbish, self.staging_dir / "removed")

    def _build(self, path: Path, manifest: Manifest, manifest_bytes: bytes) -> None:
        workplace = self.staging_dir / f"package-{manifest.name}-{manifest.version}"
        if workplace.exists():
            remove_directory(workplace, self.staging_dir / "removed")
        workplace.mkdir()
        self._relink(workplace, manifest)
        write_file(workplace / MANIFEST_NAME, manifest_bytes)
        make_directory(path.parent)
        move(workplace, path)

    def _relink(self, directory: Path, manifest: Manifest) -> None:
        """Make every file of the directory a hard link to its blob, replacing what is something else."""
        for entry in manifest.files:
            blob, place = self.blobs.path(entry), directory / entry.name
            if not blob.is_file():
                raise MissingFileError(f"{entry.name}: its content {entry.sha256} is not in the store")
            if place.exists() and place.samefile(blob):
                continue
            temporary = directory / f".{entry.name}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.hardlink_to(blob)
            temporary.replace(place)
        sync_directory(directory)

    def _linked(self, link: PackageLink) -> InstalledPackage | None:
        reference = link.target()
        return None if reference is None else self.package(reference)

    def _package_dir(self, reference: PackageRef) -> Path:
        return self.packages_dir / reference.name / reference.version


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
