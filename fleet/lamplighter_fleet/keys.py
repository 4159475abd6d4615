"""The operator's signing keys: offline ones for root and targets, online ones for snapshot and timestamp.

Whoever holds ``online/`` can only say that the repository is fresh. Whoever holds ``offline/`` decides what the fleet
may run, so that directory belongs on a medium that is not plugged in. ``root.json`` is public: it goes onto every
device, and everything else is trusted because of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.durable import make_directory, storage_errors, write_file

ROOT_NAME: Final = "root.json"
_PLACES: Final = {
    Root.type: "offline/root.pem",
    Targets.type: "offline/targets.pem",
    Snapshot.type: "online/snapshot.pem",
    Timestamp.type: "online/timestamp.pem",
}
_SECRET_MODE: Final = 0o600
_SECRET_DIRECTORY_MODE: Final = 0o700


@dataclass(frozen=True, slots=True)
class CreatedKeys:
    """What `create_keys` made.

    Attributes:
        root: The trusted root, to be put onto every device.
        key_ids: TUF key id of each role.
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
        """Return the root metadata.

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

    def signer(self, role: str) -> CryptoSigner:
        """Load the private key of a role.

        Args:
            role: ``root``, ``targets``, ``snapshot`` or ``timestamp``.

        Raises:
            ConfigError: If the key is missing, readable by others, of another kind, or the passphrase is wrong.
        """
        path = self.path / _PLACES[role]
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path}: other users may read this private key", hint=f"chmod 600 {path}")
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: the {role} key cannot be read: {error.strerror}",
                hint="plug in the medium that holds it" if path.parent.name == "offline" else None,
            ) from error
        encrypted = b"ENCRYPTED" in data.partition(b"\n")[0]
        if encrypted and self.passphrase is None:
            raise ConfigError(f"{path}: the {role} key is encrypted", hint="give its passphrase")
        try:
            key = load_pem_private_key(data, self.passphrase if encrypted else None)
        except ValueError as error:
            raise ConfigError(
                f"{path}: not a private key, or the passphrase is wrong", hint="the passphrase is that of 'keys init'"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path}: not an ed25519 key")
        return CryptoSigner(key)


def create_keys(directory: Path, *, passphrase: bytes | None = None, root_days: int = 365) -> CreatedKeys:
    """Make one ed25519 key for each role, and the root metadata that names them.

    Args:
        directory: An empty or new directory.
        passphrase: Encrypts the offline keys; the online ones stay plain, since they sign unattended.
        root_days: Days until the root must have been renewed.

    Raises:
        ConfigError: If the directory holds keys already, or the passphrase is empty.
        StoreError: If the files cannot be written.
    """
    if passphrase is not None and not passphrase:
        raise ConfigError("the passphrase is empty", hint="give a passphrase, or none at all")
    taken = [path for path in (ROOT_NAME, *_PLACES.values()) if (directory / path).exists()]
    if taken:
        raise ConfigError(
            f"{directory / taken[0]}: already there; new keys would cut off every device that trusts the old root",
            hint="name an empty directory",
        )
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=root_days)
    root = Root(version=1, expires=expires, consistent_snapshot=True)
    signers: dict[str, CryptoSigner] = {}
    with storage_errors(f"writing keys to {directory}"):
        make_directory(directory)
        for role, place in _PLACES.items():
            private = Ed25519PrivateKey.generate()
            _write_secret(directory / place, private, passphrase if place.startswith("offline/") else None)
            signers[role] = CryptoSigner(private)
            root.add_key(signers[role].public_key, role)
        metadata = Metadata(root)
        metadata.sign(signers[Root.type])
        # Last: a directory with a root has all its keys.
        write_file(directory / ROOT_NAME, metadata.to_bytes())
    return CreatedKeys(
        root=directory / ROOT_NAME,
        key_ids={role: signer.public_key.keyid for role, signer in signers.items()},
        offline=tuple(directory / place for place in _PLACES.values() if place.startswith("offline/")),
        online=tuple(directory / place for place in _PLACES.values() if place.startswith("online/")),
        expires=expires,
    )


def _write_secret(path: Path, key: Ed25519PrivateKey, passphrase: bytes | None) -> None:
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        encryption = BestAvailableEncryption(passphrase)
    make_directory(path.parent)
    path.parent.chmod(_SECRET_DIRECTORY_MODE)
    write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=_SECRET_MODE)
