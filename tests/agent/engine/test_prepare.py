from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.engine.external_data import mapped_bytes
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
from lamplighter_agent.engine.prompt_copy import PROMPTS_NAME, pays
from lamplighter_agent.errors import DiskFullError, EngineError, ManifestError, StoreError
from lamplighter_agent.package.layout import MANIFEST_NAME, MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest, read_manifest
from support.tiny_model import build_tiny_package, write_tiny_checkpoint

OPTIONS = EngineOptions(max_context_tokens=128, slots=1, threads=1)
PROMPT_WEIGHTS = msgspec.structs.replace(OPTIONS, prompt_weights=True)
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


@pytest.fixture(scope="module")
def prepared_copy(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tiny_package, tmp_path_factory.mktemp("copy"))


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_change_within_a_word_is_found_wherever_it_is(prepared_copy: Path, data: st.DataObject) -> None:
    path = prepared_copy / WEIGHTS_NAME
    content = path.read_bytes()
    place = 8 * data.draw(st.integers(0, len(content) // 8 - 1), label="word")
    change = data.draw(st.integers(1, 2**64 - 1), label="change")
    word = (int.from_bytes(content[place : place + 8], "little") ^ change).to_bytes(8, "little")
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(word)
    try:
        assert damaged_file(prepared_copy) == WEIGHTS_NAME
    finally:
        path.write_bytes(content)
    assert damaged_file(prepared_copy) is None


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


def test_room_is_asked_for_the_weights_as_they_are_read(
    tiny_package: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = shutil.copytree(tiny_package, tmp_path / "package")
    manifest = read_manifest(package)
    memory = msgspec.structs.replace(manifest.memory, weights_bytes=10**9)
    (package / MANIFEST_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, memory=memory)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 2 * 10**9))
    with pytest.raises(DiskFullError, match="needs about 3000000000 bytes"):
        prepare(package, root)


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


def test_prompts_have_weights_of_their_own_where_they_are_wanted(tiny_package: Path, root: Path) -> None:
    prepare(tiny_package, root)
    assert Engine.load(tiny_package, options=PROMPT_WEIGHTS, prepared_root=root).plan.prompt_weights_bytes == 0
    directory = prepare(tiny_package, root, prompts="always")
    plain, own = (
        Engine.load(tiny_package, options=options, prepared_root=root) for options in (OPTIONS, PROMPT_WEIGHTS)
    )
    assert plain.plan.prompt_weights_bytes == 0
    assert own.plan.prompt_weights_bytes == mapped_bytes(directory / PROMPTS_NAME / MODEL_NAME)
    expected, found = (engine.runner.prefill(0, PROMPT) for engine in (plain, own))
    assert not np.array_equal(found, expected)
    # The same weights: the difference is the rounding of activations to 8 bits.
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    # A single token, and so every decode step, has the same bits.
    for engine in (plain, own):
        engine.runner.cache.release(0)
    assert np.array_equal(own.runner.prefill(0, PROMPT[:1]), plain.runner.prefill(0, PROMPT[:1]))


@pytest.mark.parametrize("chunk", [2, 7, 16])
def test_with_weights_for_prompts_a_prompt_in_chunks_has_the_bits_of_the_whole(
    tiny_package: Path, root: Path, chunk: int
) -> None:
    prepare(tiny_package, root, prompts="always")
    runner = Engine.load(tiny_package, options=PROMPT_WEIGHTS, prepared_root=root).runner
    whole = runner.prefill(0, PROMPT[:32])
    runner.cache.release(0)
    for start in range(0, 32 - chunk, chunk):
        runner.prefill(0, PROMPT[start : start + chunk])
    assert np.array_equal(runner.prefill(0, PROMPT[runner.cache.offset(0) : 32]), whole)


def test_without_room_for_them_prompts_use_the_weights_for_decoding(
    tiny_package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tiny_package, root, prompts="always")
    monkeypatch.setattr("lamplighter_agent.engine.loading.mapped_bytes", lambda path: 1 << 50)
    engine = Engine.load(tiny_package, options=PROMPT_WEIGHTS, prepared_root=root)
    expected = Engine.load(tiny_package, options=OPTIONS, prepared_root=root)
    assert engine.plan.prompt_weights_bytes == 0
    assert tokens(engine) == tokens(expected)


def test_damaged_weights_for_prompts_are_not_used_and_made_anew(
    tiny_package: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = prepare(tiny_package, root, prompts="always")
    flip(directory / PROMPTS_NAME / WEIGHTS_NAME)
    with caplog.at_level(logging.WARNING):
        engine = Engine.load(tiny_package, options=PROMPT_WEIGHTS, prepared_root=root)
    assert engine.prepared
    assert engine.plan.prompt_weights_bytes == 0
    assert f"{WEIGHTS_NAME} in {directory / PROMPTS_NAME} is damaged" in caplog.text
    prepare(tiny_package, root, prompts="always")
    assert damaged_file(directory / PROMPTS_NAME) is None


def test_weights_for_prompts_that_do_not_pay_are_dropped_and_not_tried_again(
    tiny_package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamplighter_agent.engine.prepare.pays", lambda copy, manifest, *, threads: False)
    directory = prepare(tiny_package, root, prompts="faster")
    assert not (directory / PROMPTS_NAME).exists()
    before = (directory / WEIGHTS_NAME).stat()
    assert (prepare(tiny_package, root, prompts="faster") / WEIGHTS_NAME).stat().st_ino == before.st_ino


def test_weights_for_prompts_that_cannot_be_made_leave_the_copy_whole(
    tiny_package: Path, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(copy: Path, manifest: Manifest, *, threads: int) -> bool:
        raise EngineError("memory ran out")

    monkeypatch.setattr("lamplighter_agent.engine.prepare.pays", fail)
    directory = prepare(tiny_package, root, prompts="faster")
    assert not (directory / PROMPTS_NAME).exists()
    assert damaged_file(directory) is None
    assert "prompts are computed with the weights for decoding: memory ran out" in caplog.text


@pytest.mark.parametrize(("name", "faster"), [("prompts", True), ("plain", False)])
def test_the_faster_model_computes_prompts(
    tiny_package: Path, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, faster: bool
) -> None:
    directory = prepare(tiny_package, root, prompts="always")
    seconds = {"plain": 0.2, "prompts": 0.2} | {name: 0.1}
    turns = itertools.cycle(seconds.values())  # plain, prompts, plain, …
    monkeypatch.setattr("lamplighter_agent.engine.prompt_copy._timed", lambda runner, prompt: next(turns))
    assert pays(directory, read_manifest(tiny_package), threads=1) is faster


def test_a_full_precision_package_has_no_weights_for_prompts(tmp_path: Path, root: Path) -> None:
    package = build_tiny_package(write_tiny_checkpoint(tmp_path / "checkpoint"), tmp_path / "package", precision="fp32")
    assert not (prepare(package, root, prompts="always") / PROMPTS_NAME).exists()
