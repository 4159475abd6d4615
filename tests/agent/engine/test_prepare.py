from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prepare import (
    PREPARED_NAME,
    PreparedKey,
    check_prepared,
    cpu_identity,
    damaged_file,
    main,
    prepare,
    prepared_directory,
    prepared_key,
)
from lamplighter_agent.errors import DiskFullError, ManifestError, StoreError
from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME

OPTIONS = EngineOptions(max_context_tokens=128, slots=1, threads=1)
GREEDY = GenerationParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = list(range(3, 40))

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


def tokens(engine: Engine) -> list[int | None]:
    return [token.token_id for token in engine.generate(PROMPT, GREEDY)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_prepared_package_generates_the_same(tiny_package: Path, root: Path) -> None:
    directory = prepare(tiny_package, root)
    assert directory == prepared_directory(root, prepared_key(tiny_package))
    assert {path.name for path in directory.iterdir()} == {MODEL_NAME, WEIGHTS_NAME, PREPARED_NAME}
    built, mapped = (
        Engine.load(tiny_package, options=OPTIONS),
        Engine.load(tiny_package, options=OPTIONS, prepared_root=root),
    )
    assert (built.prepared, mapped.prepared) == (False, True)
    assert tokens(built) == tokens(mapped)


def test_a_good_copy_is_kept_as_it_is(tiny_package: Path, root: Path) -> None:
    before = (prepare(tiny_package, root) / WEIGHTS_NAME).stat()
    after = (prepare(tiny_package, root) / WEIGHTS_NAME).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("change", [{"cpu": "other_cpu"}, {"onnxruntime": "1.99.0"}, {"manifest_sha256": "0" * 64}])
def test_a_copy_for_another_key_is_replaced(tiny_package: Path, root: Path, change: dict[str, str]) -> None:
    key = prepared_key(tiny_package)
    other: PreparedKey = msgspec.structs.replace(key, **change)
    stale = prepare(tiny_package, root, key=other)
    assert check_prepared(prepared_directory(root, key), key) is not None
    directory = prepare(tiny_package, root)
    assert check_prepared(directory, key) is None
    assert list(root.iterdir()) == [directory]
    assert stale == directory or not stale.exists()


def test_copies_of_other_packages_stay(tiny_package: Path, root: Path) -> None:
    other = prepare(tiny_package, root, key=msgspec.structs.replace(prepared_key(tiny_package), package="other/1.0"))
    prepare(tiny_package, root)
    assert other.is_dir()


@pytest.mark.parametrize("name", [MODEL_NAME, WEIGHTS_NAME])
def test_a_flipped_byte_is_found_and_the_package_loads_as_built(
    tiny_package: Path, root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = prepare(tiny_package, root)
    flip(directory / name)
    assert damaged_file(directory) == name
    with caplog.at_level(logging.WARNING):
        engine = Engine.load(tiny_package, options=OPTIONS, prepared_root=root)
    assert not engine.prepared
    assert name in caplog.text
    prepare(tiny_package, root)
    assert damaged_file(directory) is None
    assert Engine.load(tiny_package, options=OPTIONS, prepared_root=root).prepared


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 1}'])
def test_an_unreadable_record_makes_a_copy_useless(tiny_package: Path, root: Path, content: bytes) -> None:
    directory = prepare(tiny_package, root)
    (directory / PREPARED_NAME).write_bytes(content)
    assert check_prepared(directory, prepared_key(tiny_package)) is not None
    assert not Engine.load(tiny_package, options=OPTIONS, prepared_root=root).prepared


@pytest.mark.parametrize("name", [MODEL_NAME, WEIGHTS_NAME])
def test_a_cut_off_or_missing_file_makes_a_copy_useless(tiny_package: Path, root: Path, name: str) -> None:
    directory = prepare(tiny_package, root)
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in str(check_prepared(directory, prepared_key(tiny_package)))
    path.unlink()
    assert str(path) in str(check_prepared(directory, prepared_key(tiny_package)))


def test_without_a_copy_the_package_loads_as_built(
    tiny_package: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not Engine.load(tiny_package, options=OPTIONS, prepared_root=root).prepared
    assert "loaded as built" in caplog.text


def test_what_an_interrupted_run_left_is_removed(tiny_package: Path, root: Path) -> None:
    directory = prepared_directory(root, prepared_key(tiny_package))
    left = root / f".{directory.name}.12345"
    left.mkdir(parents=True)
    (left / WEIGHTS_NAME).write_bytes(b"half")
    prepare(tiny_package, root)
    assert [path.name for path in root.iterdir()] == [directory.name]


def test_a_full_disk_is_told_before_writing(tiny_package: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
    with pytest.raises(DiskFullError, match="10 are free"):
        prepare(tiny_package, root)
    assert list(root.iterdir()) == []


def test_a_root_that_is_a_file_is_a_store_error(tiny_package: Path, tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write the prepared copy"):
        prepare(tiny_package, root)


def test_a_directory_that_is_no_package_is_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ManifestError):
        prepare(tmp_path, root)
    assert not root.exists()


def test_the_cpu_identity_follows_the_flags(tmp_path: Path) -> None:
    names = []
    for number, text in enumerate(["flags : avx2 fma\n", "flags : fma avx2\n", "flags : avx2\n", "Features : asimd\n"]):
        path = tmp_path / f"cpuinfo{number}"
        path.write_text(f"processor : 0\n{text}\n", encoding="ascii")
        names.append(cpu_identity(path))
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_the_command_prints_the_directory(tiny_package: Path, root: Path) -> None:
    command = [sys.executable, "-m", "lamplighter_agent.engine.prepare", str(tiny_package), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == str(prepared_directory(root, prepared_key(tiny_package)))


def test_the_command_fails_with_the_errors_exit_code(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(root)]) == ManifestError.exit_code
    assert "manifest.json" in capsys.readouterr().err
