"""The operator's signing keys: offline ones for root and targets, online ones for snapshot and timestamp.

Whoever holds ``online/`` can only say that the repository is fresh. Whoever holds ``offline/`` decides what the fleet
may run, so that directory belongs on a medium that is not plugged in. ``root.json`` is public: it goes onto every
device, and everything else is trusted because of it. Devices follow from one root to the next by themselves; all of
them lie in ``roots/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.durable import make_directory, storage_errors, write_file

ROOT_NAME: Final = "root.json"
ROOTS: Final = "roots"
PLACES: Final = {Root.type: "offline", Targets.type: "offline", Snapshot.type: "online", Timestamp.type: "online"}
"""The directory of each role's private keys; the roles in the order in which trust flows."""

_SECRET_MODE: Final = 0o600
_SECRET_DIRECTORY_MODE: Final = 0o700
_MAX_KEYS: Final = 16


@dataclass(frozen=True, slots=True)
class CreatedKeys:
    """What `create_keys` made.

    Attributes:
        root: The trusted root, to be put onto every device.
        key_ids: TUF key id of each role's first key.
        offline: Private keys to keep off the network.
        online: Private keys that the publishing host needs.
        expires: When the root must have been renewed.
    """

    root: Path
    key_ids: dict[str, str]
    offline: tuple[Path, ...]
    online: tuple[Path, ...]
    expires: datetime


@dataclass(frozen=True, slots=True)
class KeyDirectory:
    """A directory made by `create_keys`.

    Attributes:
        path: The directory.
        passphrase: Opens the offline keys, or None if they are not encrypted.
    """

    path: Path
    passphrase: bytes | None = None

    def root(self) -> bytes:
        """Return the newest root metadata.

        Raises:
            ConfigError: If it is not there.
        """
        path = self.path / ROOT_NAME
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: the root cannot be read: {error.strerror}",
                hint="make keys first: lamplighter-fleet keys init DIR",
            ) from error

    def roots(self) -> tuple[Metadata[Root], ...]:
        """Return every root, oldest first, each signed by itself and by the one before it.

        Raises:
            ConfigError: If one is missing or not valid.
        """
        newest = self._decode(self.root(), ROOT_NAME)
        earlier = []
        for version in range(1, newest.signed.version):
            name = f"{ROOTS}/{version}.root.json"
            try:
                earlier.append(self._decode((self.path / name).read_bytes(), name))
            except OSError as error:
                raise ConfigError(f"{self.path / name}: an earlier root cannot be read: {error.strerror}") from error
        chain = (*earlier, newest)
        for before, after in pairwise(chain):
            try:
                before.signed.verify_delegate(Root.type, after.signed_bytes, after.signatures)
            except RepositoryError as error:
                what = f"root {after.signed.version} is not signed by the keys of the one before it: {error}"
                raise ConfigError(f"{self.path}: {what}") from error
        return chain

    def private_keys(self, role: str) -> tuple[Path, ...]:
        """Return the files that may hold keys of a role; whether the root names them shows when they are opened."""
        return tuple(sorted((self.path / PLACES[role]).glob(f"{role}*.pem")))

    def signers(self, role: str, root: Root | None = None) -> tuple[CryptoSigner, ...]:
        """Load the private keys of a role, enough of them to sign.

        Args:
            role: ``root``, ``targets``, ``snapshot`` or ``timestamp``.
            root: The root that names the keys; None: the newest.

        Raises:
            ConfigError: If too few keys are here, or one is readable by others, of another kind, or the passphrase is
                wrong.
        """
        named = (root or self._decode(self.root(), ROOT_NAME).signed).roles[role]
        loaded = {}
        for path in self.private_keys(role):
            signer = self.load(path, role)
            if signer.public_key.keyid in named.keyids:
                loaded[signer.public_key.keyid] = signer
        if len(loaded) < named.threshold:
            place = self.path / PLACES[role]
            raise ConfigError(
                f"{place}: the {role} key cannot be read: {len(loaded)} of the {named.threshold} needed are there",
                hint="plug in the medium that holds it" if place.name == "offline" else None,
            )
        return tuple(loaded.values())

    def load(self, path: Path, role: str) -> CryptoSigner:
        """Open one private key of a role.

        Raises:
            ConfigError: If it is readable by others, no ed25519 key, or the passphrase is missing or wrong.
        """
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path}: other users may read this private key", hint=f"chmod 600 {path}")
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: the {role} key cannot be read: {error.strerror}") from error
        encrypted = is_encrypted(data)
        if encrypted and self.passphrase is None:
            raise ConfigError(
                f"{path}: the {role} key is encrypted",
                hint="give its passphrase: --ask-passphrase, or --passphrase-file FILE",
            )
        try:
            key = load_pem_private_key(data, self.passphrase if encrypted else None)
        except ValueError as error:
            raise ConfigError(
                f"{path}: not a private key, or the passphrase is wrong", hint="the passphrase is that of 'keys init'"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path}: not an ed25519 key")
        return CryptoSigner(key)

    def _decode(self, data: bytes, name: str) -> Metadata[Root]:
        try:
            metadata = Metadata[Root].from_bytes(data)
            metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise ConfigError(f"{self.path}: {name} is not valid: {error}") from error
        return metadata


def create_keys(
    directory: Path,
    *,
    passphrase: bytes | None = None,
    root_days: int = 365,
    root_keys: int = 1,
    root_threshold: int = 1,
) -> CreatedKeys:
    """Make ed25519 keys for every role, and the root metadata that names them.

    Args:
        directory: An empty or new directory.
        passphrase: Encrypts the offline keys; the online ones stay plain, since they sign unattended.
        root_days: Days until the root must have been renewed.
        root_keys: Keys that may sign a root, so that losing one is no disaster.
        root_threshold: How many of them must.

    Raises:
        ConfigError: If the directory holds keys already, the passphrase is empty, or the threshold cannot be met.
        StoreError: If the files cannot be written.
    """
    if passphrase is not None and not passphrase:
        raise ConfigError("the passphrase is empty", hint="give a passphrase, or none at all")
    if not 1 <= root_threshold <= root_keys <= _MAX_KEYS:
        raise ConfigError(
            f"{root_threshold} of {root_keys} root keys cannot sign", hint=f"1 <= threshold <= keys <= {_MAX_KEYS}"
        )
    taken = [path for path in (ROOT_NAME, *PLACES.values()) if (directory / path).exists()]
    if taken:
        raise ConfigError(
            f"{directory / taken[0]}: already there; new keys would cut off every device that trusts the old root",
            hint="name an empty directory",
        )
    root = Root(version=1, expires=in_days(root_days), consistent_snapshot=True)
    signers: dict[str, list[CryptoSigner]] = {}
    written: list[Path] = []
    with storage_errors(f"writing keys to {directory}"):
        make_directory(directory)
        for role in PLACES:
            for number in range(root_keys if role == Root.type else 1):
                name = role if number == 0 else f"{role}-{number + 1}"
                signer, path = new_key(directory, role, name, passphrase)
                signers.setdefault(role, []).append(signer)
                written.append(path)
                root.add_key(signer.public_key, role)
        root.roles[Root.type].threshold = root_threshold
        # Last: a directory with a root has all its keys.
        keep_root(directory, root, signers[Root.type])
    return CreatedKeys(
        root=directory / ROOT_NAME,
        key_ids={role: of_role[0].public_key.keyid for role, of_role in signers.items()},
        offline=tuple(path for path in written if path.parent.name == "offline"),
        online=tuple(path for path in written if path.parent.name == "online"),
        expires=root.expires,
    )


def new_key(directory: Path, role: str, name: str, passphrase: bytes | None) -> tuple[CryptoSigner, Path]:
    """Make a private key and write it; an offline one is encrypted if there is a passphrase.

    Raises:
        OSError: If it cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    path = directory / PLACES[role] / f"{name}.pem"
    write_secret(path, private, passphrase if PLACES[role] == "offline" else None)
    return CryptoSigner(private), path


def keep_root(directory: Path, root: Root, signers: Sequence[CryptoSigner]) -> None:
    """Sign a root and make it the newest of the directory.

    Raises:
        OSError: If it cannot be written; the root before is then still the newest.
    """
    metadata = Metadata(root)
    for signer in signers:
        metadata.sign(signer, append=True)
    data = metadata.to_bytes()
    make_directory(directory / ROOTS)
    write_file(directory / ROOTS / f"{root.version}.root.json", data)
    write_file(directory / ROOT_NAME, data)


def write_secret(path: Path, key: Ed25519PrivateKey, passphrase: bytes | None) -> None:
    """Write a private key for its owner alone, encrypted if there is a passphrase.

    Raises:
        OSError: If it cannot be written.
    """
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encryption = BestAvailableEncryption(passphrase)
    make_directory(path.parent)
    path.parent.chmod(_SECRET_DIRECTORY_MODE)
    write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=_SECRET_MODE)


def is_encrypted(data: bytes) -> bool:
    """Return whether a private key's file needs a passphrase."""
    return b"ENCRYPTED" in data.partition(b"\n")[0]


def any_encrypted(directory: Path) -> bool:
    """Return whether a key directory has an offline key that needs a passphrase."""
    offline = (directory / "offline").glob("*.pem")
    return any(is_encrypted(path.read_bytes()) for path in offline if path.is_file())


def in_days(days: int) -> datetime:
    """Return the time so many days from now, whole seconds, as metadata has it."""
    return datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
