from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.errors import (
    ConfigError,
    DownloadError,
    ExpiredMetadataError,
    HashMismatchError,
    HttpError,
    LamplighterError,
    MetadataError,
    MissingFileError,
    RollbackError,
    SignatureError,
    TooLongError,
    UnknownPackageError,
)
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.update.downloader import Downloader, HttpSource
from lamplighter_agent.update.states import PackageRef
from lamplighter_agent.update.trust import TrustedRepository, read_root
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.publish import publish_package
from lamplighter_fleet.repository import Expiry, Repository
from support.package_server import Fault
from support.packages import write_package
from support.update_world import PATIENT, World

ONE, TWO = PackageRef("tiny", "1.0.0"), PackageRef("tiny", "2.0.0")


def device(world: World, root: bytes | None = None) -> TrustedRepository:
    """Return a device that keeps its trusted metadata between calls."""
    return TrustedRepository(
        Downloader(HttpSource(world.server.url), PATIENT),
        root=root or world.keys.root(),
        metadata_dir=world.path / "state" / "metadata",
        scratch_dir=world.path / "state" / "staging" / "metadata",
    )


def shown(world: World, name: str) -> Path:
    return world.repository_dir / "metadata" / name


def trusted(world: World) -> dict[str, int]:
    """Return the version of each role that the device trusts."""
    versions = {}
    for path in (world.path / "state" / "metadata").glob("*.json"):
        versions[path.stem] = msgspec.json.decode(path.read_bytes())["signed"]["version"]
    return versions


@pytest.fixture
def published(world: World) -> World:
    world.publish()
    return world


def test_signed_manifest_comes_as_it_was_published(published: World) -> None:
    data = device(published).fetch_manifest(ONE).data
    assert data == (published.path / "built" / "1.0.0" / MANIFEST_NAME).read_bytes()
    assert trusted(published) == {"timestamp": 1, "snapshot": 1, "targets": 1}


def test_signed_packages_are_listed(published: World) -> None:
    published.publish("2.0.0", weights_seed=2)
    assert device(published).packages() == (ONE, TWO)


def test_unsigned_package_is_unknown_and_the_versions_on_offer_are_named(published: World) -> None:
    with pytest.raises(UnknownPackageError) as caught:
        device(published).fetch_manifest(TWO)
    assert "1.0.0" in (caught.value.hint or "")


def test_repository_of_another_operator_is_refused(published: World) -> None:
    create_keys(published.path / "other")
    with pytest.raises(SignatureError, match=r"timestamp\.json"):
        device(published, KeyDirectory(published.path / "other").root()).check()
    assert trusted(published) == {}


def test_root_that_is_no_root_is_refused(published: World) -> None:
    with pytest.raises(MetadataError, match="the trusted root"):
        device(published, b"{}").check()
    assert published.server.exchanges == []


def test_root_with_a_broken_signature_is_refused(published: World) -> None:
    root = published.keys.root().replace(b'"version":1', b'"version":2')
    with pytest.raises(SignatureError):
        device(published, root).check()


def test_root_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root\.json"):
        read_root(tmp_path / "root.json")


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_metadata_without_its_signature_is_refused(published: World, role: str) -> None:
    path = next(published.repository_dir.glob(f"metadata/*{role}.json"))
    tree = msgspec.json.decode(path.read_bytes())
    tree["signatures"][0]["sig"] = "00" * 64
    path.write_bytes(msgspec.json.encode(tree))
    # Below the timestamp the hashes of the metadata above catch it first.
    with pytest.raises(SignatureError if role == "timestamp" else HashMismatchError, match=role):
        device(published).check()
    assert role not in trusted(published)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_expired_metadata_is_refused(published: World, role: str) -> None:
    days = {f"{role}_days": -1}
    expired = Repository(published.repository_dir, published.keys, Expiry(**days))
    package = published.path / "built" / "2.0.0"
    write_package(package, version="2.0.0")
    publish_package(package, expired)
    with pytest.raises(ExpiredMetadataError, match=role):
        device(published).check()


def test_expired_root_is_refused(world: World) -> None:
    create_keys(world.path / "old", root_days=-1)
    world.keys = KeyDirectory(world.path / "old")
    world.publish()
    with pytest.raises(ExpiredMetadataError, match="root"):
        device(world).check()


def test_older_timestamp_is_refused(published: World) -> None:
    old = shown(published, "timestamp.json").read_bytes()
    published.repository().refresh()
    device(published).check()
    shown(published, "timestamp.json").write_bytes(old)
    with pytest.raises(RollbackError, match="timestamp"):
        device(published).check()
    assert trusted(published)["timestamp"] == 2


def test_older_timestamp_is_refused_after_a_check_that_failed_further_on(published: World) -> None:
    """What was accepted before the failure is kept: it raises the floor."""
    old = shown(published, "timestamp.json").read_bytes()
    published.repository().refresh()
    published.server.faults.append(Fault("snapshot.json", status=404))
    with pytest.raises(MissingFileError, match="snapshot"):
        device(published).check()
    published.server.faults.clear()
    shown(published, "timestamp.json").write_bytes(old)
    with pytest.raises(RollbackError):
        device(published).check()


def test_snapshot_of_another_moment_is_refused(published: World) -> None:
    published.publish("2.0.0", weights_seed=2)
    shutil.copy(shown(published, "1.snapshot.json"), shown(published, "2.snapshot.json"))
    with pytest.raises(HashMismatchError, match="snapshot"):
        device(published).check()


def test_targets_of_another_moment_are_refused(published: World) -> None:
    published.publish("2.0.0", weights_seed=2)
    shutil.copy(shown(published, "1.targets.json"), shown(published, "2.targets.json"))
    with pytest.raises(HashMismatchError, match="targets"):
        device(published).check()


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_missing_metadata_is_named(published: World, name: str) -> None:
    shown(published, name).unlink()
    with pytest.raises(MissingFileError, match=name):
        device(published).check()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10000, b"\xff\xfe", b'{"signed": {"_type": "root"}}'])
def test_malformed_metadata_is_refused(published: World, content: bytes) -> None:
    shown(published, "timestamp.json").write_bytes(content)
    with pytest.raises(MetadataError, match=r"timestamp\.json"):
        device(published).check()


def test_endless_metadata_is_refused(published: World) -> None:
    published.server.faults.append(Fault("timestamp.json", endless=True))
    with pytest.raises(TooLongError, match=r"timestamp\.json"):
        device(published).check()


def test_changed_manifest_is_refused(published: World) -> None:
    published.server.faults.append(Fault("/targets/", flip_at=50))
    with pytest.raises(HashMismatchError, match="not the signed file"):
        device(published).fetch_manifest(ONE)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("/targets/", status=404), MissingFileError),
        (Fault("/targets/", status=500), HttpError),
        (Fault("/targets/", endless=True), TooLongError),
        (Fault("/metadata/", status=502), HttpError),
    ],
)
def test_transport_keeps_its_own_error(published: World, fault: Fault, error: type[LamplighterError]) -> None:
    published.server.faults.append(fault)
    with pytest.raises(error) as caught:
        device(published).fetch_manifest(ONE)
    assert type(caught.value) is error


def test_server_that_went_away_is_a_download_error(published: World) -> None:
    published.server.faults.append(Fault("/metadata/", cut_after=0))
    with pytest.raises(DownloadError):
        device(published).check()


def test_damaged_trusted_metadata_is_fetched_again(published: World) -> None:
    device(published).check()
    for path in (published.path / "state" / "metadata").rglob("*.json"):
        path.write_bytes(b"")
    assert device(published).packages() == (ONE,)
    assert trusted(published) == {"timestamp": 1, "snapshot": 1, "targets": 1}


def test_only_news_is_fetched(published: World) -> None:
    device(published).check()
    published.server.exchanges.clear()
    device(published).check()
    assert [exchange.path for exchange in published.server.exchanges] == [
        "/metadata/2.root.json",
        "/metadata/timestamp.json",
    ]
