"""Changing keys: a new root says which keys count from now on, signed by the old root's keys and the new one's.

Devices find the new root by themselves at their next check, one version after the other. What the old keys had signed
is signed anew at once (`Repository.take_over`), since devices that know the new root do not accept it any more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Root

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.durable import make_directory, move, remove_file, storage_errors
from lamplighter_fleet.keys import PLACES, KeyDirectory, in_days, is_encrypted, keep_root, new_key, write_secret

RETIRED: Final = "retired"


@dataclass(frozen=True, slots=True)
class KeyState:
    """A key that the newest root names.

    Attributes:
        role: What it signs.
        key_id: TUF key id.
        threshold: How many keys of the role must sign.
        file: Its private key, or None if that is not here.
        encrypted: True if the file needs a passphrase.
    """

    role: str
    key_id: str
    threshold: int
    file: Path | None
    encrypted: bool


@dataclass(frozen=True, slots=True)
class RootChange:
    """A new root.

    Attributes:
        version: Its version.
        removed: Key ids that count no more.
        added: Key ids that are new.
        files: Private keys of the new ones.
    """

    version: int
    removed: tuple[str, ...]
    added: tuple[str, ...]
    files: tuple[Path, ...]


def list_keys(keys: KeyDirectory) -> tuple[KeyState, ...]:
    """Return every key that the newest root names. A file whose key is not open cannot be told from others of its role.

    Raises:
        ConfigError: If the root is not valid, or a key's passphrase is wrong.
    """
    root = keys.roots()[-1].signed
    states = []
    for role in PLACES:
        files = _files_by_id(keys, role)
        for key_id in root.roles[role].keyids:
            file = files.get(key_id)
            encrypted = file is not None and is_encrypted(file.read_bytes())
            states.append(KeyState(role, key_id, root.roles[role].threshold, file, encrypted))
    return tuple(states)


def rotate_key(keys: KeyDirectory, role: str, *, key_id: str | None = None) -> RootChange:
    """Put a new key in the place of one; the old file goes to ``retired/``.

    Args:
        keys: The key directory.
        role: Whose key.
        key_id: Which one (its beginning will do), where the role has several.

    Raises:
        ConfigError: If there is no such key, or too few root keys are here to sign the change.
        StoreError: If the files cannot be written; the old root then counts still.
    """
    return _replace(keys, role, _find_key(keys, role, key_id), destroy=False, replacement=True)


def revoke_key(keys: KeyDirectory, key_id: str) -> RootChange:
    """Take a key that got into wrong hands out of the root and delete its file.

    A new one takes its place where too few would be left to sign.

    Args:
        keys: The key directory.
        key_id: Which one; its beginning will do.

    Raises:
        ConfigError: If there is no such key, or too few root keys are here to sign the change.
        StoreError: If the files cannot be written; the old root then counts still.
    """
    root = keys.roots()[-1].signed
    for role in PLACES:
        if any(known.startswith(key_id) for known in root.roles[role].keyids):
            found = _find_key(keys, role, key_id)
            left = len(root.roles[role].keyids) - 1
            return _replace(keys, role, found, destroy=True, replacement=left < root.roles[role].threshold)
    raise ConfigError(f"{keys.path}: the root names no key {key_id}", hint="list them: lamplighter-fleet keys show DIR")


def renew_root(keys: KeyDirectory, *, days: int = 365) -> RootChange:
    """Sign the same keys for longer.

    Raises:
        ConfigError: If too few root keys are here.
        StoreError: If the files cannot be written.
    """
    before = keys.roots()[-1].signed
    root = copy.deepcopy(before)
    root.version += 1
    root.expires = in_days(days)
    with storage_errors(f"writing root {root.version} to {keys.path}"):
        keep_root(keys.path, root, keys.signers(Root.type, before))
    return RootChange(root.version, (), (), ())


def change_passphrase(keys: KeyDirectory, passphrase: bytes | None) -> tuple[Path, ...]:
    """Encrypt the offline keys with another passphrase, or not at all.

    Returns:
        The files.

    Raises:
        ConfigError: If a key cannot be opened with the present one, or the new one is empty.
        StoreError: If a file cannot be written; each is then encrypted with the one or the other.
    """
    if passphrase is not None and not passphrase:
        raise ConfigError("the passphrase is empty", hint="give a passphrase, or none at all")
    opened = {}
    for role in PLACES:
        if PLACES[role] != "offline":
            continue
        for path in _files_by_id(keys, role).values():
            data = path.read_bytes()
            opened[path] = load_pem_private_key(data, keys.passphrase if is_encrypted(data) else None)
    with storage_errors(f"writing keys to {keys.path}"):
        for path, key in opened.items():
            write_secret(path, key, passphrase)  # type: ignore[arg-type]  # _files_by_id opens ed25519 keys alone
    return tuple(opened)


def _replace(keys: KeyDirectory, role: str, key_id: str, *, destroy: bool, replacement: bool) -> RootChange:
    before = keys.roots()[-1].signed
    root = copy.deepcopy(before)
    root.version += 1
    old_signers = keys.signers(Root.type, before)
    old_file = _files_by_id(keys, role).get(key_id)
    added: list[CryptoSigner] = []
    files: list[Path] = []
    with storage_errors(f"writing root {root.version} to {keys.path}"):
        root.revoke_key(key_id, role)
        if replacement:
            signer, path = new_key(keys.path, role, f"{role}-r{root.version}", keys.passphrase)
            root.add_key(signer.public_key, role)
            added, files = [signer], [path]
        # Both roots' thresholds must be met: devices check a new root with the old keys and with its own.
        signers = {signer.public_key.keyid: signer for signer in (*old_signers, *(added if role == Root.type else ()))}
        _check_threshold(root, signers, keys)
        keep_root(keys.path, root, tuple(signers.values()))
        if old_file is not None:
            _put_away(keys, old_file, destroy=destroy)
    return RootChange(root.version, (key_id,), tuple(signer.public_key.keyid for signer in added), tuple(files))


def _check_threshold(root: Root, signers: dict[str, CryptoSigner], keys: KeyDirectory) -> None:
    named = root.roles[Root.type]
    able = sum(key_id in signers for key_id in named.keyids)
    if able < named.threshold:
        raise ConfigError(
            f"{keys.path}: {able} of the {named.threshold} root keys needed are there",
            hint="plug in the medium that holds them",
        )


def _put_away(keys: KeyDirectory, file: Path, *, destroy: bool) -> None:
    if destroy:
        remove_file(file)
        return
    retired = keys.path / RETIRED
    make_directory(retired)
    retired.chmod(0o700)
    move(file, retired / file.name)


def _find_key(keys: KeyDirectory, role: str, key_id: str | None) -> str:
    named = keys.roots()[-1].signed.roles[role].keyids
    found = [known for known in named if known.startswith(key_id or "")]
    if len(found) == 1:
        return found[0]
    what = f"no {role} key begins with {key_id}" if not found else f"{len(found)} {role} keys are meant"
    raise ConfigError(f"{keys.path}: {what}", hint=f"name one of {', '.join(known[:12] for known in named)}")


def _files_by_id(keys: KeyDirectory, role: str) -> dict[str, Path]:
    """Return the private keys of a role that are here, by key id."""
    return {keys.load(path, role).public_key.keyid: path for path in keys.private_keys(role)}
