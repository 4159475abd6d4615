"""The symbolic links of the store, each naming one of its packages."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lamplighter_agent.errors import ManifestError, StoreError
from lamplighter_agent.package.durable import point_link, remove_directory, remove_file
from lamplighter_agent.update.states import PackageRef

_PACKAGES: Final = "packages"


class PackageLink:
    """A link such as ``current -> packages/NAME/VERSION``.

    Args:
        path: The link; ``packages/`` lies beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def target(self) -> PackageRef | None:
        """Return the package that the link names, or None if there is no link.

        Raises:
            StoreError: If it is no link, or names anything but a package of this store.
        """
        try:
            parts = self._path.readlink().parts
        except FileNotFoundError:
            return None
        except OSError as error:
            hint = "it must be a symbolic link to a package"
            raise StoreError(f"{self._path}: {error.strerror}", hint=hint) from error
        elsewhere = StoreError(f"{self._path}: leads to {'/'.join(parts)}, which is no package of this store")
        if parts[:1] != (_PACKAGES,) or len(parts) != 3:
            raise elsewhere
        try:
            return PackageRef(parts[1], parts[2])
        except ManifestError as error:
            raise elsewhere from error

    def point(self, reference: PackageRef) -> None:
        """Make the link name a package, in one atomic and durable step.

        Raises:
            OSError: If that fails; the link is then as before.
        """
        point_link(self._path, f"{_PACKAGES}/{reference}")

    def make_way(self, trash: Path) -> None:
        """Remove a directory that lies in the link's place: a rename cannot replace it.

        Args:
            trash: A path on the same file system that holds nothing but rubbish.

        Raises:
            OSError: If that fails.
        """
        if self._path.is_dir() and not self._path.is_symlink():
            remove_directory(self._path, trash)

    def remove(self) -> None:
        """Remove the link, durably; one that is not there is fine.

        Raises:
            OSError: If that fails.
        """
        remove_file(self._path)
