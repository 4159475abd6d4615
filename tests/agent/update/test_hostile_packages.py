"""Packages that somebody with a signing key, or a web server, made to do harm: each its own error, nothing outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest
from tuf.api.metadata import TargetFile

from lamplighter_agent.errors import (
    GraphError,
    HashMismatchError,
    LamplighterError,
    ManifestError,
    MissingFileError,
    TooLongError,
    TruncatedDownloadError,
)
from lamplighter_agent.package.layout import MANIFEST_NAME, MAX_MANIFEST_BYTES, MODEL_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from lamplighter_agent.update.sources import DirectorySource
from lamplighter_agent.update.states import UpdateState
from lamplighter_fleet.repository import Repository
from support.graphs import graph_bytes
from support.package_server import Fault
from support.packages import file_entry, write_package
from support.update_world import World, desired

Tree = dict[str, Any]


def sign(world: World, manifest: bytes) -> None:
    """Sign a manifest as ``tiny/2.0.0`` whatever it says: the publishing command would refuse it."""
    repository = Repository(world.repository_dir, world.keys)
    with repository.lock():
        before = repository.published()
        assert before is not None
        path = f"tiny/2.0.0/{MANIFEST_NAME}"
        target = TargetFile.from_data(path, manifest, ["sha256"])
        place = world.repository_dir / "targets" / "tiny" / "2.0.0"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{target.hashes['sha256']}.{MANIFEST_NAME}").write_bytes(manifest)
        repository.sign_targets({**before.targets.targets, path: target}, before)


def publish_hostile(world: World, change: Callable[[Tree], None], graph: bytes = b"") -> None:
    """Publish ``tiny/2.0.0`` with other weights, its manifest changed after the files were written."""
    package = world.path / "built" / "2.0.0"
    write_package(package, version="2.0.0", weights_seed=2, graph=graph)
    tree = msgspec.json.decode((package / MANIFEST_NAME).read_bytes())
    for file in (MODEL_NAME, WEIGHTS_NAME, TOKENIZER_NAME):
        blob = world.repository_dir / "blobs" / "sha256" / file_entry(package / file, "other")["sha256"]
        blob.write_bytes((package / file).read_bytes())
    change(tree)
    sign(world, msgspec.json.encode(tree))


def rename_weights(name: str) -> Callable[[Tree], None]:
    return lambda tree: tree["files"][1].update(name=name)


def many_files(tree: Tree) -> None:
    entry = {"role": "other", "length": 1, "sha256": "0" * 64}
    tree["files"] += [{"name": f"f{number}", **entry} for number in range(65)]


def wrong_digest(tree: Tree) -> None:
    tree["files"][1].update(sha256="../../../../etc/passwd")


def lying_chunks(tree: Tree) -> None:
    tree["files"][1]["chunk_sha256"][3] = "0" * 64


def longer(tree: Tree) -> None:
    tree["files"][1]["length"] += 4000


def shorter(tree: Tree) -> None:
    tree["files"][1].update(length=100, chunk_sha256=[])


class Case(NamedTuple):
    change: Callable[[Tree], None]
    error: type[LamplighterError]
    graph: bytes = b""


def leave(tree: Tree) -> None:
    return


CASES = {
    "name leads up": Case(rename_weights("../../current"), ManifestError),
    "name is absolute": Case(rename_weights("/etc/cron.d/x"), ManifestError),
    "name has a folder": Case(rename_weights("a/b"), ManifestError),
    "name is the manifest's": Case(rename_weights("Manifest.json"), ManifestError),
    "name begins with a dot": Case(rename_weights(".ssh"), ManifestError),
    "digest is a path": Case(wrong_digest, ManifestError),
    "more files than allowed": Case(many_files, ManifestError),
    "another package's name": Case(lambda tree: tree.update(name="other"), ManifestError),
    "another version": Case(lambda tree: tree.update(version="1.0.0"), ManifestError),
    "chunk hash lies": Case(lying_chunks, HashMismatchError),
    "length too large": Case(longer, ManifestError),
    "length too small": Case(shorter, TooLongError),
    "custom operators": Case(leave, GraphError, graph_bytes(domains=("evil.ops",))),
    "external data above": Case(leave, GraphError, graph_bytes(locations=("../1.0.0/model.onnx.data",))),
    "external data anywhere": Case(leave, GraphError, graph_bytes(locations=("/etc/shadow",))),
    "no graph at all": Case(leave, GraphError, b"\x7fELF" + bytes(500)),
}


def outside(world: World) -> dict[str, bytes]:
    """Everything beside the store and the repository."""
    kept = (world.path / "state", world.repository_dir, world.path / "built")
    return {
        str(path): path.read_bytes()
        for path in world.path.rglob("*")
        if path.is_file() and not any(path.is_relative_to(folder) for folder in kept)
    }


def check_refused(world: World, error: type[LamplighterError]) -> None:
    """The update is refused with just this error, version 1 serves on, and nothing lies about."""
    before = outside(world)
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert report.reason == error.reason, report.message
    assert report.state in {UpdateState.FAILED, UpdateState.REJECTED}
    assert report.active == "tiny/1.0.0"
    current = world.store.current()
    assert current is not None
    world.store.verify(current)
    assert outside(world) == before
    assert [str(reference) for reference in world.store.installed()] == ["tiny/1.0.0"]
    assert world.service.tried == []
    state = world.path / "state"
    assert not [p for p in state.rglob("*") if p.is_symlink() and not p.resolve().is_relative_to(state.resolve())]


@pytest.mark.parametrize("name", CASES)
def test_hostile_package_is_refused(world: World, name: str) -> None:
    world.install()
    publish_hostile(world, CASES[name].change, CASES[name].graph)
    check_refused(world, CASES[name].error)


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"format_version":"1.0","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"format_version":"1.0","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"format_version":"1.0","files":[' + b'{"name":"f"},' * 100_000 + b"{}]}",
        b"\xff\xfe",
        b"",
        b"null",
        b'{"format_version":"1.0","name":' + b"9" * 100_000 + b"}",
    ],
    ids=["deep list", "deep object", "100,000 files", "no text", "nothing", "null", "long number"],
)
def test_hostile_manifest_is_refused(world: World, manifest: bytes) -> None:
    world.install()
    sign(world, manifest)
    check_refused(world, ManifestError)


def test_manifest_larger_than_any_may_be_is_not_fetched(world: World) -> None:
    world.install()
    sign(world, b"{" + b" " * MAX_MANIFEST_BYTES + b"}")
    check_refused(world, TooLongError)
    assert world.server.body_bytes("/targets/") == 0


@pytest.mark.parametrize("file", [MODEL_NAME, WEIGHTS_NAME, TOKENIZER_NAME])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"flip_at": 1}, HashMismatchError),
        ({"status": 404}, MissingFileError),
        ({"cut_after": 1}, TruncatedDownloadError),
        ({"endless": True, "flip_at": 0}, HashMismatchError),
        ({"announce": 10**12}, TooLongError),
    ],
    ids=["flipped byte", "missing", "cut off", "endless", "announced too long"],
)
def test_each_file_is_guarded(world: World, file: str, fault: dict[str, Any], error: type[LamplighterError]) -> None:
    world.install()

    package = world.path / "built" / "2.0.0"
    write_package(package, version="2.0.0", weights_seed=2, graph=graph_bytes(padding=b"other"))
    (package / TOKENIZER_NAME).write_bytes(b'{"other": true}')
    tree = msgspec.json.decode((package / MANIFEST_NAME).read_bytes())
    tree["files"][2] = file_entry(package / TOKENIZER_NAME, "tokenizer")
    for entry in tree["files"]:
        blob = world.repository_dir / "blobs" / "sha256" / entry["sha256"]
        blob.write_bytes((package / entry["name"]).read_bytes())
    sign(world, msgspec.json.encode(tree))
    digest = next(entry["sha256"] for entry in tree["files"] if entry["name"] == file)
    world.server.faults.append(Fault(digest, **fault))
    check_refused(world, error)


def test_files_swapped_on_the_server_are_refused(world: World) -> None:
    world.install()
    publish_hostile(world, leave, graph_bytes(padding=b"other"))
    package = world.path / "built" / "2.0.0"
    first, second = (
        world.repository_dir / "blobs" / "sha256" / file_entry(package / name, "other")["sha256"]
        for name in (MODEL_NAME, WEIGHTS_NAME)
    )
    model, weights = first.read_bytes(), second.read_bytes()
    first.write_bytes(weights[: len(model)])
    second.write_bytes(model.ljust(len(weights)))
    check_refused(world, HashMismatchError)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_links_in_the_store_lead_nowhere(world: World, kind: str) -> None:
    """Somebody who may write to the store puts a link where the next blob or package file goes."""
    world.install()
    world.publish("2.0.0", weights_seed=2)
    secret = world.path / "secret"
    secret.write_bytes(b"keep me")
    tree = msgspec.json.decode((world.path / "built" / "2.0.0" / MANIFEST_NAME).read_bytes())
    weights = world.store.blobs.directory / tree["files"][1]["sha256"]
    for place in (weights, weights.with_name(f"{weights.name}.part")):
        place.symlink_to(secret) if kind == "symbolic link" else place.hardlink_to(secret)
    report = world.updater().apply(desired("2.0.0", id="two")).report
    assert secret.read_bytes() == b"keep me"
    assert report.active in {"tiny/1.0.0", "tiny/2.0.0"}
    current = world.store.current()
    assert current is not None
    world.store.verify(current)


def test_links_on_a_stick_are_read_but_checked_like_all_else(world: World) -> None:
    world.install()
    world.publish("2.0.0", weights_seed=2)
    tree = msgspec.json.decode((world.path / "built" / "2.0.0" / MANIFEST_NAME).read_bytes())
    blob = world.repository_dir / "blobs" / "sha256" / tree["files"][1]["sha256"]
    blob.unlink()
    blob.symlink_to("/dev/zero")
    report = world.updater(source=DirectorySource(world.repository_dir)).apply(desired("2.0.0", id="two")).report
    assert (report.state, report.reason) == (UpdateState.FAILED, MissingFileError.reason)
    assert report.active == "tiny/1.0.0"
