from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from lamplighter_agent.errors import (
    ConfigError,
    HashMismatchError,
    ManifestError,
    MetadataError,
    MissingFileError,
    PackageError,
    SignatureError,
    StoreError,
)
from lamplighter_agent.package.layout import MANIFEST_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import UNKNOWN_LICENCE
from lamplighter_fleet.cli import main
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.publish import list_packages, publish_package
from lamplighter_fleet.repository import Expiry, Repository
from support.packages import WEIGHTS_BYTES, load_manifest, write_package


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyDirectory:
    directory = tmp_path_factory.mktemp("keys")
    create_keys(directory)
    return KeyDirectory(directory)


@pytest.fixture
def repository(tmp_path: Path, keys: KeyDirectory) -> Repository:
    return Repository(tmp_path / "repository", keys)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_package(tmp_path / "package")
    return tmp_path / "package"


def snapshot_of(directory: Path) -> dict[str, bytes]:
    """Return what a web server would show."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".publishing"
    }


class _Files(FetcherInterface):
    """Reads the repository as python-tuf's own client does, without a network."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._directory / url
        if not path.is_file():
            raise DownloadHTTPError(url, 404)
        return iter([path.read_bytes()])


def client_sees(repository: Repository, tmp_path: Path, target: str) -> bytes | None:
    """Return a target as python-tuf's own client gets it, all checks done."""
    work = tmp_path / "client"
    shutil.rmtree(work, ignore_errors=True)
    (work / "metadata").mkdir(parents=True)
    (work / "targets").mkdir()
    root = (repository.metadata_dir / "1.root.json").read_bytes()
    updater = Updater(
        str(work / "metadata"),
        "metadata/",
        str(work / "targets"),
        "targets/",
        fetcher=_Files(repository.directory),
        bootstrap=root,
    )
    info = updater.get_targetinfo(target)
    return None if info is None else Path(updater.download_target(info)).read_bytes()


def test_published_package_is_seen_by_a_plain_tuf_client(repository: Repository, package: Path, tmp_path: Path) -> None:
    publication = publish_package(package, repository)
    assert publication.reference == "tiny/1.0.0"
    assert publication.new_bytes == load_manifest(package).total_bytes
    seen = client_sees(repository, tmp_path, "tiny/1.0.0/manifest.json")
    assert seen == (package / MANIFEST_NAME).read_bytes()


def test_package_without_a_named_licence_is_published_with_a_warning(
    package: Path, keys: KeyDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = msgspec.structs.replace(load_manifest(package), licence=UNKNOWN_LICENCE)
    (package / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    options = ["--repository", str(tmp_path / "repository"), "--keys", str(keys.path), "--json"]
    assert main(["publish", str(package), *options]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["package"] == "tiny/1.0.0"
    assert "names no licence" in found.err


def test_blobs_lie_under_their_digest(repository: Repository, package: Path) -> None:
    publish_package(package, repository)
    for entry in load_manifest(package).files:
        blob = repository.directory / "blobs" / "sha256" / entry.sha256
        assert blob.read_bytes() == (package / entry.name).read_bytes()


def test_second_version_adds_only_what_changed(repository: Repository, package: Path, tmp_path: Path) -> None:
    publish_package(package, repository)
    write_package(tmp_path / "second", version="2.0.0", weights_seed=2)
    publication = publish_package(tmp_path / "second", repository)
    assert publication.new_bytes == WEIGHTS_BYTES
    assert publication.signed is not None
    assert publication.signed.targets_version == 2
    assert [listed.reference for listed in list_packages(repository)] == ["tiny/1.0.0", "tiny/2.0.0"]
    assert client_sees(repository, tmp_path, "tiny/1.0.0/manifest.json") is not None


def test_same_package_again_changes_nothing(repository: Repository, package: Path) -> None:
    publish_package(package, repository)
    before = snapshot_of(repository.directory)
    publication = publish_package(package, repository)
    assert publication.signed is None
    assert publication.new_bytes == 0
    assert snapshot_of(repository.directory) == before


def test_same_package_again_repairs_a_damaged_blob(repository: Repository, package: Path) -> None:
    publish_package(package, repository)
    before = snapshot_of(repository.directory)
    blob = repository.directory / "blobs" / "sha256" / load_manifest(package).file("weights").sha256
    blob.write_bytes(bytes(WEIGHTS_BYTES))
    assert publish_package(package, repository).new_bytes == WEIGHTS_BYTES
    assert snapshot_of(repository.directory) == before


def test_published_version_is_never_replaced(repository: Repository, package: Path, tmp_path: Path) -> None:
    publish_package(package, repository)
    before = snapshot_of(repository.directory)
    write_package(tmp_path / "other", weights_seed=9)
    with pytest.raises(PackageError, match="published already") as caught:
        publish_package(tmp_path / "other", repository)
    assert type(caught.value) is PackageError
    assert snapshot_of(repository.directory) == before


def change_weights(package: Path) -> None:
    with (package / WEIGHTS_NAME).open("r+b") as stream:
        stream.write(b"X")


def shorten_weights(package: Path) -> None:
    os.truncate(package / WEIGHTS_NAME, 100)


def remove_weights(package: Path) -> None:
    (package / WEIGHTS_NAME).unlink()


def link_weights(package: Path) -> None:
    moved = package.parent / "elsewhere"
    (package / WEIGHTS_NAME).rename(moved)
    (package / WEIGHTS_NAME).symlink_to(moved)


def remove_manifest(package: Path) -> None:
    (package / MANIFEST_NAME).unlink()


def swap_chunk_hashes(package: Path) -> None:
    tree = msgspec.json.decode((package / MANIFEST_NAME).read_bytes())
    chunks = tree["files"][1]["chunk_sha256"]
    chunks[0], chunks[1] = chunks[1], chunks[0]
    (package / MANIFEST_NAME).write_bytes(msgspec.json.encode(tree))


def name_a_path(package: Path) -> None:
    tree = msgspec.json.decode((package / MANIFEST_NAME).read_bytes())
    tree["version"] = "../../x"
    (package / MANIFEST_NAME).write_bytes(msgspec.json.encode(tree))


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (change_weights, HashMismatchError, WEIGHTS_NAME),
        (shorten_weights, HashMismatchError, WEIGHTS_NAME),
        (remove_weights, MissingFileError, WEIGHTS_NAME),
        (link_weights, MissingFileError, WEIGHTS_NAME),
        (remove_manifest, ManifestError, MANIFEST_NAME),
        (swap_chunk_hashes, HashMismatchError, "chunk hashes"),
        (name_a_path, ManifestError, "version"),
    ],
)
def test_damaged_package_is_not_published(
    repository: Repository, package: Path, damage: Callable[[Path], None], error: type[PackageError], named: str
) -> None:
    damage(package)
    with pytest.raises(error, match=named):
        publish_package(package, repository)
    assert not repository.directory.exists()


def test_refresh_renews_snapshot_and_timestamp_alone(repository: Repository, package: Path, tmp_path: Path) -> None:
    publish_package(package, repository)
    signed = repository.refresh()
    assert (signed.targets_version, signed.snapshot_version, signed.timestamp_version) == (1, 2, 2)
    assert client_sees(repository, tmp_path, "tiny/1.0.0/manifest.json") is not None


def test_refresh_needs_no_offline_key(
    repository: Repository, package: Path, keys: KeyDirectory, tmp_path: Path
) -> None:
    publish_package(package, repository)
    online = tmp_path / "online-host"
    shutil.copytree(keys.path / "online", online / "online")
    shutil.copy(keys.path / "root.json", online)
    signed = Repository(repository.directory, KeyDirectory(online)).refresh()
    assert signed.timestamp_version == 2


def test_expired_repository_can_be_refreshed(keys: KeyDirectory, package: Path, tmp_path: Path) -> None:
    publish_package(package, Repository(tmp_path / "r", keys, Expiry(snapshot_days=-1, timestamp_days=-1)))
    fresh = Repository(tmp_path / "r", keys)
    fresh.refresh()
    assert client_sees(fresh, tmp_path, "tiny/1.0.0/manifest.json") is not None


def test_empty_repository_cannot_be_refreshed(repository: Repository) -> None:
    with pytest.raises(ConfigError, match="nothing is published"):
        repository.refresh()


def test_publishing_without_the_targets_key_changes_nothing(
    repository: Repository, package: Path, keys: KeyDirectory, tmp_path: Path
) -> None:
    publish_package(package, repository)
    before = snapshot_of(repository.directory / "metadata")
    online = tmp_path / "online-host"
    shutil.copytree(keys.path / "online", online / "online")
    shutil.copy(keys.path / "root.json", online)
    write_package(tmp_path / "second", version="2.0.0", weights_seed=2)
    with pytest.raises(ConfigError, match="targets key"):
        publish_package(tmp_path / "second", Repository(repository.directory, KeyDirectory(online)))
    assert snapshot_of(repository.directory / "metadata") == before


def test_targets_that_somebody_else_wrote_are_never_signed(
    repository: Repository, package: Path, tmp_path: Path
) -> None:
    """Whoever may write to the web server must not get the operator's signature by way of the next publication."""
    create_keys(tmp_path / "attacker")
    attacker = Repository(repository.directory, KeyDirectory(tmp_path / "attacker"))
    publish_package(package, attacker)
    write_package(tmp_path / "second", version="2.0.0")
    with pytest.raises(SignatureError, match=r"timestamp\.json"):
        publish_package(tmp_path / "second", repository)


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_damaged_metadata_is_told(repository: Repository, package: Path, name: str) -> None:
    publish_package(package, repository)
    (repository.metadata_dir / name).write_bytes(b"{}")
    with pytest.raises(MetadataError, match=name):
        list_packages(repository)


@pytest.mark.parametrize("cut_at", range(12))
def test_publication_that_is_cut_off_shows_the_old_state_or_the_new(
    repository: Repository, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    publish_package(package, repository)
    write_package(tmp_path / "second", version="2.0.0", weights_seed=2)
    real, calls = os.replace, iter(range(100))

    class PowerCut(BaseException):
        pass

    def cut(source: Path, destination: Path) -> None:
        if next(calls) == cut_at:
            raise PowerCut
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        try:
            publish_package(tmp_path / "second", repository)
        except PowerCut:
            assert client_sees(repository, tmp_path, "tiny/2.0.0/manifest.json") is None
    assert client_sees(repository, tmp_path, "tiny/1.0.0/manifest.json") is not None
    publish_package(tmp_path / "second", repository)
    assert client_sees(repository, tmp_path, "tiny/2.0.0/manifest.json") is not None


def test_two_cannot_publish_at_once(repository: Repository, package: Path) -> None:
    with repository.lock(), pytest.raises(StoreError, match="another process"):
        publish_package(package, repository)


def test_progress_ends_at_the_whole(repository: Repository, package: Path) -> None:
    seen: list[tuple[int, int]] = []
    publish_package(package, repository, progress=lambda done, total: seen.append((done, total)))
    total = load_manifest(package).total_bytes
    assert seen[-1] == (total, total)
