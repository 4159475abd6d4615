from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from lamplighter_agent.errors import (
    DiskFullError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    StoreError,
    UnknownPackageError,
)
from lamplighter_agent.package.layout import MANIFEST_NAME, MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.update.installed import InstalledPackage, verify_package
from lamplighter_agent.update.states import PackageRef
from lamplighter_agent.update.store import Store
from support.packages import WEIGHTS_BYTES, load_manifest, write_package

ONE, TWO, THREE = (PackageRef("tiny", f"{number}.0.0") for number in (1, 2, 3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state", reserve_bytes=0)


def install(store: Store, reference: PackageRef, *, seed: int | None = None) -> InstalledPackage:
    """Bring a package into the store as an update would."""
    built = store.root.parent / "built" / reference.version
    if not built.exists():
        write_package(built, version=reference.version, weights_seed=seed or int(reference.version[0]))
    with store.lock():
        for entry in store.blobs.missing(load_manifest(built)):
            shutil.copyfile(built / entry.name, store.blobs.path(entry))
        return store.stage((built / MANIFEST_NAME).read_bytes())


def blobs(store: Store) -> int:
    return len(list(store.blobs.directory.iterdir()))


def test_empty_store_has_nothing(store: Store) -> None:
    assert store.current() is None
    assert store.previous() is None
    assert store.installed() == ()


def test_staged_package_is_a_real_directory_of_hard_links(store: Store) -> None:
    package = install(store, ONE)
    assert package.path == store.packages_dir / "tiny" / "1.0.0"
    assert not package.path.is_symlink()
    for entry in package.manifest.files:
        assert (package.path / entry.name).samefile(store.blobs.path(entry))
    assert verify_package(package.path).reference == "tiny/1.0.0"
    assert store.current() is None


def test_equal_files_of_two_versions_are_stored_once(store: Store) -> None:
    first, second = install(store, ONE), install(store, TWO)
    assert (first.path / MODEL_NAME).samefile(second.path / MODEL_NAME)
    assert not (first.path / WEIGHTS_NAME).samefile(second.path / WEIGHTS_NAME)
    assert blobs(store) == 4


def test_staging_needs_every_blob(store: Store) -> None:
    built = store.root.parent / "built"
    write_package(built)
    with store.lock(), pytest.raises(MissingFileError, match=MODEL_NAME):
        store.stage((built / MANIFEST_NAME).read_bytes())
    assert store.installed() == ()


def test_current_is_one_link_to_the_real_directory(store: Store) -> None:
    package = install(store, ONE)
    store.activate(ONE)
    assert (store.root / "current").readlink() == Path("packages/tiny/1.0.0")
    assert store.current() == package
    assert store.previous() is None


def test_roll_back_and_forth(store: Store) -> None:
    install(store, ONE), install(store, TWO)
    store.activate(ONE)
    store.activate(TWO)
    previous = store.previous()
    assert previous is not None
    assert previous.reference == ONE
    assert store.roll_back().reference == ONE
    current = store.current()
    assert current is not None
    assert current.reference == ONE
    assert store.previous() is None
    with pytest.raises(UnknownPackageError):
        store.roll_back()


def test_activating_what_is_active_keeps_the_previous(store: Store) -> None:
    install(store, ONE), install(store, TWO)
    for reference in (ONE, TWO, TWO):
        store.activate(reference)
    previous = store.previous()
    assert previous is not None
    assert previous.reference == ONE


def test_package_that_is_not_there_cannot_be_activated(store: Store) -> None:
    install(store, ONE)
    store.activate(ONE)
    with pytest.raises(UnknownPackageError, match=r"tiny/2\.0\.0 is not installed"):
        store.activate(TWO)
    current = store.current()
    assert current is not None
    assert current.reference == ONE


@pytest.mark.parametrize("target", ["/etc", "../outside/a/b", "packages/tiny", "packages/tiny/..", "blobs/a/b"])
def test_current_that_leads_elsewhere_is_refused(store: Store, target: str) -> None:
    install(store, ONE)
    (store.root / "current").symlink_to(target)
    with pytest.raises(StoreError, match="no package of this store"):
        store.current()


def test_current_that_is_no_link_is_refused(store: Store) -> None:
    (store.root / "current").mkdir(parents=True)
    with pytest.raises(StoreError):
        store.current()


def test_verify_names_the_damaged_file(store: Store) -> None:
    package = install(store, ONE)
    with (package.path / WEIGHTS_NAME).open("r+b") as stream:
        stream.write(b"X")
    with pytest.raises(HashMismatchError, match=WEIGHTS_NAME):
        store.verify(package)


def test_verify_names_the_missing_file(store: Store) -> None:
    package = install(store, ONE)
    (package.path / WEIGHTS_NAME).unlink()
    with pytest.raises(MissingFileError, match=WEIGHTS_NAME):
        store.verify(package)


def test_link_in_place_of_a_file_counts_as_missing(store: Store) -> None:
    package = install(store, ONE)
    weights = package.path / WEIGHTS_NAME
    weights.unlink()
    weights.symlink_to(store.blobs.path(package.manifest.file("weights")))
    with pytest.raises(MissingFileError, match=WEIGHTS_NAME):
        store.verify(package)


def test_file_that_the_manifest_does_not_list_is_found(store: Store) -> None:
    package = install(store, ONE)
    (package.path / "extra.so").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"extra\.so"):
        verify_package(package.path)


def test_bad_file_is_discarded_and_linked_anew(store: Store) -> None:
    package = install(store, ONE)
    with (package.path / WEIGHTS_NAME).open("r+b") as stream:
        stream.write(b"X")
    with store.lock():
        assert store.discard_bad_files(package) == (WEIGHTS_NAME,)
    assert [entry.name for entry in store.blobs.missing(package.manifest)] == [WEIGHTS_NAME]
    store.verify(install(store, ONE))


def test_same_version_with_another_manifest_replaces_a_package_that_is_not_in_use(store: Store) -> None:
    install(store, ONE)
    shutil.rmtree(store.root.parent / "built")
    package = install(store, ONE, seed=7)
    store.verify(package)
    assert store.package(ONE).manifest == package.manifest


def test_same_version_with_another_manifest_never_replaces_the_package_in_use(store: Store) -> None:
    before = install(store, ONE)
    store.activate(ONE)
    shutil.rmtree(store.root.parent / "built")
    with pytest.raises(StoreError, match="in use"):
        install(store, ONE, seed=7)
    assert store.current() == before
    store.verify(before)


def test_prune_keeps_current_previous_and_what_is_named(store: Store) -> None:
    for reference in (ONE, TWO, THREE):
        install(store, reference)
    store.activate(ONE)
    store.activate(TWO)
    for name in ("tiny-1.0.0-cpu-ort", "tiny-2.0.0-cpu-ort", "tiny-3.0.0-cpu-ort"):
        (store.prepared_dir / name).mkdir()
    with store.lock():
        store.prune()
    assert store.installed() == (ONE, TWO)
    assert sorted(path.name for path in store.prepared_dir.iterdir()) == ["tiny-1.0.0-cpu-ort", "tiny-2.0.0-cpu-ort"]
    assert blobs(store) == 4
    for package in (store.package(ONE), store.package(TWO)):
        store.verify(package)


def test_prune_removes_rubbish_of_a_crash(store: Store) -> None:
    install(store, ONE)
    (store.staging_dir / "package-tiny-9").mkdir()
    (store.staging_dir / "removed-package").mkdir()
    (store.blobs.directory / ("0" * 64)).write_bytes(b"orphan")
    (store.blobs.directory / ("1" * 64 + ".part")).write_bytes(b"orphan")
    store.activate(ONE)
    with store.lock():
        store.prune()
    assert list(store.staging_dir.iterdir()) == []
    assert blobs(store) == 3


def test_prune_spares_the_blobs_of_the_update_at_work(store: Store) -> None:
    install(store, ONE)
    store.activate(ONE)
    coming = write_package(store.root.parent / "coming", version="2.0.0", weights_seed=2)
    part = store.blobs.directory / (coming.file("weights").sha256 + ".part")
    part.write_bytes(b"half")
    with store.lock():
        store.prune(keep_blobs_of=coming)
    assert part.read_bytes() == b"half"


def test_package_in_use_is_never_discarded(store: Store) -> None:
    package = install(store, ONE)
    store.activate(ONE)
    with store.lock(), pytest.raises(StoreError):
        store.discard(ONE)
    store.verify(package)


def test_preflight_counts_what_is_missing_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    install(store, ONE)
    second = write_package(store.root.parent / "second", version="2.0.0", weights_seed=2)

    def free(count: int) -> None:
        fields = list(os.statvfs("/"))
        fields[0], fields[1], fields[4] = 1, 1, count
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))

    free(WEIGHTS_BYTES)
    store.blobs.preflight(second)
    with pytest.raises(DiskFullError, match=r"tiny/2\.0\.0"):
        store.blobs.preflight(second, extra_bytes=1)
    free(WEIGHTS_BYTES - 1)
    with pytest.raises(DiskFullError):
        store.blobs.preflight(second)
    part = store.blobs.directory / (second.file("weights").sha256 + ".part")
    part.write_bytes(b"x")
    store.blobs.preflight(second)


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EROFS, StoreError), (errno.EIO, StoreError)],
)
def test_refusing_disk_leaves_current_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StoreError]
) -> None:
    install(store, ONE), install(store, TWO)
    store.activate(ONE)

    def refuse(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        with pytest.raises(error) as caught:
            store.activate(TWO)
    assert type(caught.value) is error
    assert os.strerror(code) in str(caught.value)
    current = store.current()
    assert current is not None
    assert current.reference == ONE
    store.activate(TWO)


def test_store_is_locked_once(store: Store) -> None:
    with store.lock(), pytest.raises(StoreError, match="another update"), Store(store.root).lock():
        pass
    with store.lock():
        pass


def test_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(StoreError), Store(tmp_path / "state").lock():
        pass
