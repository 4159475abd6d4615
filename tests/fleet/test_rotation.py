"""Changing keys, and what a device that knows an old root makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lamplighter_agent.errors import ConfigError, LamplighterError, RollbackError, SignatureError
from lamplighter_agent.update.downloader import Downloader
from lamplighter_agent.update.sources import DirectorySource
from lamplighter_agent.update.states import PackageRef
from lamplighter_agent.update.trust import TrustedRepository
from lamplighter_fleet.cli import main
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.publish import allow_downgrade, list_packages, publish_package, withdraw_package
from lamplighter_fleet.repository import Repository
from lamplighter_fleet.rotation import change_passphrase, list_keys, renew_root, revoke_key, rotate_key
from support.packages import write_package

ONE = PackageRef("tiny", "1.0.0")


class Shop:
    """An operator with one published package, and a device that got the first root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        create_keys(folder / "keys")
        self.keys = KeyDirectory(folder / "keys")
        self.first_root = self.keys.root()
        self.publish("1.0.0")

    @property
    def repository(self) -> Repository:
        return Repository(self.folder / "repository", self.keys)

    def publish(self, version: str) -> None:
        package = self.folder / version
        write_package(package, version=version)
        publish_package(package, self.repository)

    def device(self) -> TrustedRepository:
        return TrustedRepository(
            Downloader(DirectorySource(self.folder / "repository")),
            root=self.first_root,
            metadata_dir=self.folder / "metadata",
            scratch_dir=self.folder / "scratch",
        )

    def key_of(self, role: str) -> str:
        return next(state.key_id for state in list_keys(self.keys) if state.role == role)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    made = Shop(tmp_path)
    made.device().check()
    return made


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_device_follows_a_rotation(shop: Shop, role: str) -> None:
    old = shop.key_of(role)
    change = rotate_key(shop.keys, role)
    assert change.removed == (old,)
    assert change.added == (shop.key_of(role),)
    assert shop.repository.take_over() is not None
    assert shop.device().packages() == (ONE,)
    shop.publish("2.0.0")
    assert shop.device().packages() == (ONE, PackageRef("tiny", "2.0.0"))
    assert (shop.keys.path / "retired").is_dir()


def test_device_that_was_away_follows_several_rotations(shop: Shop) -> None:
    for role in ("root", "timestamp", "root", "targets", "snapshot"):
        rotate_key(shop.keys, role)
        shop.repository.take_over()
    assert shop.device().packages() == (ONE,)
    assert len(shop.keys.roots()) == 6


def test_what_a_revoked_key_signs_is_refused(shop: Shop) -> None:
    """A thief has the online keys and the web server, and signs ever newer states."""
    stolen, copied = shop.folder / "stolen", shop.folder / "copied"
    shutil.copytree(shop.keys.path, stolen)
    shutil.copytree(shop.folder / "repository", copied)
    revoke_key(shop.keys, shop.key_of("timestamp")[:12])
    shop.repository.take_over()
    shop.device().check()
    for _ in range(5):
        Repository(copied, KeyDirectory(stolen)).refresh()
    for path in (copied / "metadata").iterdir():
        shutil.copy(path, shop.folder / "repository" / "metadata")
    with pytest.raises(SignatureError, match="timestamp"):
        shop.device().check()


def test_revoked_key_s_file_is_gone_and_a_new_one_takes_its_place(shop: Shop) -> None:
    old = next(state for state in list_keys(shop.keys) if state.role == "targets")
    change = revoke_key(shop.keys, old.key_id)
    assert old.file is not None
    assert not old.file.exists()
    assert [path.name for path in change.files] == ["targets-r2.pem"]


def test_one_of_several_root_keys_is_revoked_without_a_new_one(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys", root_keys=3, root_threshold=2)
    keys = KeyDirectory(tmp_path / "keys")
    roots = [state for state in list_keys(keys) if state.role == "root"]
    assert [state.threshold for state in roots] == [2, 2, 2]
    change = revoke_key(keys, roots[0].key_id)
    assert change.added == ()
    assert [state.key_id for state in list_keys(keys) if state.role == "root"] == [s.key_id for s in roots[1:]]
    # Two of three sign when one is lost, one alone does not.
    (tmp_path / "keys" / "offline" / "root-3.pem").unlink()
    with pytest.raises(ConfigError, match="1 of the 2 needed"):
        renew_root(keys)
    assert keys.roots()[-1].signed.version == 2


def test_published_by_old_keys_is_refused_until_the_change_is_applied(shop: Shop) -> None:
    rotate_key(shop.keys, "snapshot")
    with pytest.raises(SignatureError, match="snapshot") as caught:
        shop.repository.refresh()
    assert "keys apply" in (caught.value.hint or "")
    assert shop.device().packages() == (ONE,)  # nobody has shown the new root yet
    shop.repository.take_over()
    shop.repository.refresh()
    assert shop.device().packages() == (ONE,)


def test_renewed_root_reaches_the_device(shop: Shop) -> None:
    renew_root(shop.keys, days=1000)
    shop.repository.take_over()
    shop.device().check()
    kept = json.loads((shop.folder / "metadata" / "root_history" / "2.root.json").read_bytes())
    assert kept["signed"]["expires"] == f"{shop.keys.roots()[-1].signed.expires:%Y-%m-%dT%H:%M:%SZ}"


def test_older_state_of_the_repository_is_refused_after_a_rotation(shop: Shop) -> None:
    old = (shop.folder / "repository" / "metadata" / "timestamp.json").read_bytes()
    rotate_key(shop.keys, "targets")
    shop.repository.take_over()
    shop.device().check()
    (shop.folder / "repository" / "metadata" / "timestamp.json").write_bytes(old)
    with pytest.raises(RollbackError):
        shop.device().check()


def test_passphrase_is_changed_and_taken_away(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys", passphrase=b"one")
    change_passphrase(KeyDirectory(tmp_path / "keys", b"one"), b"two")
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        rotate_key(KeyDirectory(tmp_path / "keys", b"one"), "root")
    change = rotate_key(KeyDirectory(tmp_path / "keys", b"two"), "root")
    assert b"ENCRYPTED" in change.files[0].read_bytes()
    change_passphrase(KeyDirectory(tmp_path / "keys", b"two"), None)
    assert [state.encrypted for state in list_keys(KeyDirectory(tmp_path / "keys"))] == [False] * 4


@pytest.mark.parametrize(("keys", "threshold"), [(1, 2), (0, 0), (17, 1)])
def test_threshold_that_nobody_can_meet_is_refused(tmp_path: Path, keys: int, threshold: int) -> None:
    with pytest.raises(ConfigError, match="cannot sign"):
        create_keys(tmp_path / "keys", root_keys=keys, root_threshold=threshold)
    assert not (tmp_path / "keys").exists()


def test_root_that_the_one_before_did_not_sign_is_refused(shop: Shop) -> None:
    create_keys(shop.folder / "foreign")
    foreign = KeyDirectory(shop.folder / "foreign")
    renew_root(foreign)
    shutil.copy(foreign.path / "root.json", shop.keys.path / "root.json")
    with pytest.raises(ConfigError, match="not signed by the keys of the one before"):
        shop.keys.roots()


def test_withdrawn_package_is_no_longer_offered(shop: Shop) -> None:
    shop.publish("2.0.0")
    withdraw_package("tiny/1.0.0", shop.repository)
    assert [package.reference for package in list_packages(shop.repository)] == ["tiny/2.0.0"]
    assert shop.device().packages() == (PackageRef("tiny", "2.0.0"),)
    with pytest.raises(LamplighterError, match="not published"):
        withdraw_package("tiny/1.0.0", shop.repository)


def test_permission_is_signed_with_the_package(shop: Shop) -> None:
    shop.publish("2.0.0")
    assert allow_downgrade("tiny/1.0.0", "2.0.0", shop.repository) is not None
    assert allow_downgrade("tiny/1.0.0", "2.0.0", shop.repository) is None
    assert shop.device().fetch_manifest(ONE).custom == {"lamplighter": {"replaces": ["2.0.0"]}}
    with pytest.raises(ConfigError, match="not higher"):
        allow_downgrade("tiny/2.0.0", "1.0.0", shop.repository)


def test_commands_explain_each_step(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--keys", str(shop.keys.path)]
    repository = ["--repository", str(shop.folder / "repository")]
    old = shop.key_of("targets")
    assert main(["keys", "rotate", "targets", *where]) == 0
    assert "keys apply" in capsys.readouterr().out
    assert main(["keys", "apply", *where, *repository]) == 0
    assert main(["keys", "revoke", shop.key_of("timestamp")[:10], *where, *repository]) == 0
    said = capsys.readouterr().out
    assert "counts no more" in said
    assert "signed anew" in said
    assert main(["keys", "renew", *where, *repository, "--days", "10"]) == 0
    capsys.readouterr()
    assert main(["keys", "show", *where, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["root_version"] == 4
    assert old not in [key["id"] for key in shown["keys"]]
    assert shop.device().packages() == (ONE,)
    assert main(["withdraw", "tiny/9.9.9", *where, *repository]) == 4
