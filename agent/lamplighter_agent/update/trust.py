"""Whom to believe: the repository's signed metadata, checked by python-tuf's client. The only module that imports tuf.

The root of trust is provisioned by the operator and never fetched on first use. python-tuf decides which metadata is
trusted; this module moves the bytes, keeps what became trusted durably, and says in our words what was wrong.

python-tuf works on a scratch copy of the trusted metadata. What it accepted is then copied back with an fsync, file
by file, also when a later file was refused: each file raises the floor below which nothing is accepted again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from tuf.api import exceptions
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from lamplighter_agent.errors import (
    ConfigError,
    ExpiredMetadataError,
    HashMismatchError,
    HttpError,
    ManifestError,
    MetadataError,
    MissingFileError,
    RollbackError,
    SignatureError,
    TooLongError,
    UnknownPackageError,
)
from lamplighter_agent.package.durable import make_directory, storage_errors, write_file
from lamplighter_agent.package.layout import MANIFEST_NAME, MAX_MANIFEST_BYTES
from lamplighter_agent.update.downloader import Downloader
from lamplighter_agent.update.states import PackageRef

logger = logging.getLogger(__name__)

_METADATA: Final = "metadata/"
_TARGETS: Final = "targets/"
_ROOT_HISTORY: Final = "root_history"
# The order in which trust flows; a crash between two copies leaves a state that python-tuf could have left as well.
_ROLES: Final = ("timestamp.json", "snapshot.json", "targets.json")


def read_root(path: Path) -> bytes:
    """Return the provisioned root metadata.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the trusted root cannot be read: {error.strerror}",
            hint="copy root.json from the operator's key directory to the device and name it in repository.root_file",
        ) from error


class SignedFile(NamedTuple):
    """A target as it was published.

    Attributes:
        data: Its bytes.
        custom: What the signers said about it besides length and hashes, undecoded, or None.
    """

    data: bytes
    custom: object


class TrustedRepository:
    """The signed side of a repository.

    One instance serves one update: it asks the repository for news once and then answers from that state.

    Args:
        downloader: Reads the repository.
        root: The provisioned root metadata.
        metadata_dir: Where trusted metadata is kept.
        scratch_dir: A directory for work in progress, removed and made anew.
        not_before: A time that has passed for certain: metadata that expired before it is refused although this
            device's clock may be behind. None leaves the question to the clock.
    """

    def __init__(
        self,
        downloader: Downloader,
        *,
        root: bytes,
        metadata_dir: Path,
        scratch_dir: Path,
        not_before: datetime | None = None,
    ) -> None:
        self._downloader = downloader
        self._root = root
        self._metadata_dir = metadata_dir
        self._scratch_dir = scratch_dir
        self._not_before = not_before
        self._fetcher = _Fetcher(downloader)
        self._updater: Updater | None = None

    @property
    def last_file(self) -> str | None:
        """Path in the repository of the file that was asked for last, or None."""
        return self._fetcher.last_path or None

    def check(self) -> None:
        """Bring the trusted metadata up to date.

        Raises:
            SignatureError: If metadata is signed by too few or unknown keys, or the provisioned root is not valid.
            ExpiredMetadataError: If metadata is past its expiry date.
            RollbackError: If metadata is older than what is trusted already.
            HashMismatchError: If metadata is not what the metadata above it says.
            MetadataError: If metadata is malformed or incomplete.
            MissingFileError: If the repository lacks a metadata file.
            DownloadError: If it cannot be reached.
            StoreError: If the trusted metadata cannot be kept.
        """
        self._copy_to_scratch()
        with self._tuf_errors(), storage_errors(f"writing {self._scratch_dir}"):
            updater = Updater(
                str(self._scratch_dir),
                _METADATA,
                fetcher=self._fetcher,
                config=UpdaterConfig(),
                bootstrap=self._root,
            )
        try:
            with self._tuf_errors(), storage_errors(f"writing {self._scratch_dir}"):
                updater.refresh()
        finally:
            self._keep_trusted()
        self._check_expiry()
        self._updater = updater

    def packages(self) -> tuple[PackageRef, ...]:
        """Return every signed package, sorted by name and version text.

        Raises:
            The errors of `check`, when it was not called before.
        """
        self._checked()
        with self._tuf_errors(), storage_errors("reading the trusted metadata"):
            targets = Metadata[Targets].from_bytes((self._scratch_dir / "targets.json").read_bytes()).signed.targets
        references = []
        for path in targets:
            name, _, file = path.rpartition("/")
            if file != MANIFEST_NAME:
                continue
            try:
                references.append(PackageRef.parse(name))
            except ManifestError:
                logger.warning("the repository signs %r, which is no package name and version", path)
        return tuple(sorted(references))

    def fetch_manifest(self, reference: PackageRef, *, known: bytes | None = None) -> SignedFile:
        """Return the signed manifest of a package, as it was published.

        Args:
            reference: Which package.
            known: The manifest that is on this device, or None: if it is the signed one, nothing is transferred.

        Raises:
            UnknownPackageError: If no such package is signed.
            HashMismatchError: If the manifest's bytes are not those that were signed.
            TooLongError: If it is longer than signed, or longer than any manifest may be.
            The errors of `check`, when it was not called before.
        """
        signed = self.fetch(f"{reference}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES, known=known)
        if signed is None:
            raise UnknownPackageError(
                f"{reference} is not among the packages that the repository signs",
                hint="publish it first; the versions on offer: " + (self._versions_of(reference.name) or "none"),
            )
        return signed

    def fetch(self, path: str, max_bytes: int, *, known: bytes | None = None) -> SignedFile | None:
        """Return a signed target, or None if no such target is signed.

        Args:
            path: The target's path, as it is signed.
            max_bytes: Upper bound of its length.
            known: What an earlier call gave, or None: if that is what is signed now, nothing is transferred.

        Raises:
            HashMismatchError: If the bytes are not those that were signed.
            TooLongError: If it is longer than signed, or than ``max_bytes``.
            The errors of `check`, when it was not called before.
        """
        updater = self._checked()
        try:
            with self._tuf_errors(), storage_errors("keeping the trusted metadata"):
                target = updater.get_targetinfo(path)
        finally:
            self._keep_trusted()
        if target is None:
            return None
        if target.length > max_bytes:
            raise TooLongError(f"{path}: {target.length} bytes, but at most {max_bytes} are allowed")
        if known is not None and _is_signed(target, known):
            return SignedFile(known, target.custom)
        return SignedFile(self._fetch_target(path, target), target.custom)

    def _fetch_target(self, path: str, target: TargetFile) -> bytes:
        digest = target.hashes.get("sha256") or next(iter(target.hashes.values()))
        directory, slash, name = path.rpartition("/")
        place = f"{_TARGETS}{directory}{slash}{digest}.{name}"
        self._fetcher.last_path = place
        data = self._downloader.fetch_bytes(place, target.length)
        try:
            target.verify_length_and_hashes(data)
        except exceptions.LengthOrHashMismatchError as error:
            raise HashMismatchError(f"{self._downloader.describe(place)}: not the signed file: {error}") from error
        return data

    def _check_expiry(self) -> None:
        """Refuse metadata that had expired at a time which has passed for certain."""
        if self._not_before is None:
            return
        with self._tuf_errors(), storage_errors("reading the trusted metadata"):
            for name in ("root.json", *_ROLES):
                metadata: Metadata[Any] = Metadata.from_bytes((self._scratch_dir / name).read_bytes())
                expires = metadata.signed.expires
                if expires <= self._not_before:
                    raise ExpiredMetadataError(
                        f"{name} expired on {expires:%Y-%m-%d}, and it has been {self._not_before:%Y-%m-%d} already",
                        hint="refresh the repository's metadata (lamplighter-fleet refresh)",
                    )

    def _versions_of(self, name: str) -> str:
        return ", ".join(reference.version for reference in self.packages() if reference.name == name)

    def _checked(self) -> Updater:
        if self._updater is None:
            self.check()
        assert self._updater is not None
        return self._updater

    def _copy_to_scratch(self) -> None:
        with storage_errors(f"copying {self._metadata_dir} to {self._scratch_dir}"):
            if self._scratch_dir.exists():
                shutil.rmtree(self._scratch_dir)
            (self._scratch_dir / _ROOT_HISTORY).mkdir(parents=True)
            for path in _metadata_files(self._metadata_dir):
                (self._scratch_dir / path).write_bytes((self._metadata_dir / path).read_bytes())

    def _keep_trusted(self) -> None:
        with storage_errors(f"keeping trusted metadata in {self._metadata_dir}"):
            make_directory(self._metadata_dir / _ROOT_HISTORY)
            for path in _metadata_files(self._scratch_dir):
                data = (self._scratch_dir / path).read_bytes()
                kept = self._metadata_dir / path
                if not kept.is_file() or kept.read_bytes() != data:
                    write_file(kept, data)

    @contextmanager
    def _tuf_errors(self) -> Iterator[None]:
        """Say in our words what python-tuf refused, and at which file."""
        try:
            yield
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            raise _translate(error, self._last_place()) from error
        except ValueError as error:
            # python-tuf's data classes raise it for values that no metadata may have.
            raise MetadataError(f"{self._last_place()}: {error}") from error

    def _last_place(self) -> str:
        return self._downloader.describe(self._fetcher.last_path) if self._fetcher.last_path else "the trusted root"


def _is_signed(target: TargetFile, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except exceptions.LengthOrHashMismatchError:
        return False
    return True


def _translate(error: Exception, where: str) -> Exception:
    """Return our error for one of python-tuf's; the nearest family first."""
    cause = f"{where}: {error}"
    match error:
        case DeserializationError():
            return MetadataError(f"{where}: not valid metadata: {error}")
        case exceptions.UnsignedMetadataError():
            return SignatureError(cause, hint="does this repository belong to the root that the device was given?")
        case exceptions.ExpiredMetadataError():
            hint = "refresh the repository's metadata (lamplighter-fleet refresh); is this device's clock right?"
            return ExpiredMetadataError(cause, hint=hint)
        case exceptions.BadVersionNumberError():
            return RollbackError(cause, hint="the repository offers older metadata than this device has seen")
        case exceptions.LengthOrHashMismatchError():
            return HashMismatchError(cause)
        case exceptions.DownloadHTTPError(status_code=404):
            return MissingFileError(cause)
        case exceptions.DownloadHTTPError():
            return HttpError(cause, status=error.status_code)
        case _:
            return MetadataError(cause)


def _metadata_files(directory: Path) -> list[Path]:
    """Return the paths of trusted metadata relative to its directory, roots first, in order of their version."""
    history = directory / _ROOT_HISTORY
    roots = [path for path in history.glob("*.root.json") if path.name.partition(".")[0].isdigit()]
    roots.sort(key=lambda path: int(path.name.partition(".")[0]))
    found = [Path(_ROOT_HISTORY, path.name) for path in roots]
    found += [Path(name) for name in _ROLES if (directory / name).is_file()]
    known = {*_ROLES, "root.json"}
    found += sorted(Path(path.name) for path in directory.glob("*.json") if path.name not in known)
    return found


class _Fetcher(FetcherInterface):
    """Gives python-tuf the files it asks for, through our downloader and without its temporary files."""

    def __init__(self, downloader: Downloader) -> None:
        self._downloader = downloader
        self.last_path = ""

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return a metadata file.

        Raises:
            exceptions.DownloadHTTPError: With status 404 if there is no such file: for python-tuf that is how a
                chain of roots ends.
            LamplighterError: For every other failure; python-tuf lets it pass.
        """
        self.last_path = url
        try:
            return self._downloader.fetch_bytes(url, max_length)
        except MissingFileError as error:
            raise exceptions.DownloadHTTPError(error.message, 404) from error
        except HttpError as error:
            raise exceptions.DownloadHTTPError(error.message, error.status) from error

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self.download_bytes(url, MAX_MANIFEST_BYTES)
