from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root

from lamplighter_agent.errors import ConfigError, StoreError
from lamplighter_fleet.keys import KeyDirectory, create_keys

ROLES = ("root", "targets", "snapshot", "timestamp")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_root_names_one_ed25519_key_for_each_role(directory: Path) -> None:
    created = create_keys(directory)
    root = Metadata[Root].from_bytes(created.root.read_bytes()).signed
    assert root.consistent_snapshot
    for role in ROLES:
        assert root.roles[role].keyids == [created.key_ids[role]]
        assert root.keys[created.key_ids[role]].scheme == "ed25519"
    assert len(set(created.key_ids.values())) == 4


def test_root_is_signed_by_itself(directory: Path) -> None:
    metadata = Metadata[Root].from_bytes(create_keys(directory).root.read_bytes())
    metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)


def test_private_keys_are_for_their_owner_alone(directory: Path) -> None:
    created = create_keys(directory)
    for path in (*created.offline, *created.online):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_keys_are_loaded_again(directory: Path) -> None:
    created = create_keys(directory)
    for role in ROLES:
        assert KeyDirectory(directory).signers(role)[0].public_key.keyid == created.key_ids[role]


def test_passphrase_protects_the_offline_keys_alone(directory: Path) -> None:
    created = create_keys(directory, passphrase=b"correct horse")
    for path in created.offline:
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    locked, opened = KeyDirectory(directory), KeyDirectory(directory, b"correct horse")
    assert locked.signers("timestamp")[0].public_key.keyid == created.key_ids["timestamp"]
    assert opened.signers("targets")[0].public_key.keyid == created.key_ids["targets"]
    assert opened.signers("timestamp")[0].public_key.keyid == created.key_ids["timestamp"]
    with pytest.raises(ConfigError, match="encrypted"):
        locked.signers("targets")


def test_wrong_passphrase_is_told(directory: Path) -> None:
    create_keys(directory, passphrase=b"correct horse")
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        KeyDirectory(directory, b"battery staple").signers("root")


def test_empty_passphrase_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="empty"):
        create_keys(directory, passphrase=b"")
    assert not directory.exists()


def test_existing_keys_are_never_replaced(directory: Path) -> None:
    created = create_keys(directory)
    before = {path: path.read_bytes() for path in (*created.offline, *created.online, created.root)}
    with pytest.raises(ConfigError, match="already there"):
        create_keys(directory)
    assert {path: path.read_bytes() for path in before} == before


def test_key_that_others_may_read_is_refused(directory: Path) -> None:
    created = create_keys(directory)
    created.online[0].chmod(0o644)
    with pytest.raises(ConfigError, match="other users"):
        KeyDirectory(directory).signers("snapshot")


def test_key_on_a_medium_that_is_not_plugged_in_is_told(directory: Path) -> None:
    created = create_keys(directory)
    created.offline[1].unlink()
    with pytest.raises(ConfigError, match="targets key cannot be read") as caught:
        KeyDirectory(directory).signers("targets")
    assert "plug in" in (caught.value.hint or "")


def test_file_that_is_no_key_is_refused(directory: Path) -> None:
    created = create_keys(directory)
    created.online[0].write_bytes(b"hello")
    with pytest.raises(ConfigError, match="not a private key"):
        KeyDirectory(directory).signers("snapshot")


def test_directory_without_keys_is_told(directory: Path) -> None:
    with pytest.raises(ConfigError, match="root cannot be read"):
        KeyDirectory(directory).root()


def test_place_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"a file")
    with pytest.raises(StoreError):
        create_keys(tmp_path / "keys")
