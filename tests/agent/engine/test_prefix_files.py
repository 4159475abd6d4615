from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import CacheArray
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.engine.prefix_files import PrefixFiles

SPEC = CacheSpec(layers=2, heads=1, head_dim=4)
BYTES = SPEC.bytes_per_token
KEY = "package-runtime-cpu"


def files(directory: Path, *, key: str = KEY, max_bytes: int = 1 << 20) -> PrefixFiles:
    return PrefixFiles(directory, key, SPEC, vocab_size=100, max_bytes=max_bytes)


def add(prefixes: PrefixCache, tokens: list[int], *, pinned: bool = False) -> None:
    def fill(rows: CacheArray, begin: int) -> None:
        for index, row in enumerate(rows):
            row[:] = sum(tokens[: begin + index + 1])

    assert prefixes.store_filled(tokens, fill, pinned=pinned) == len(tokens)


def saved(directory: Path, *sequences: list[int], key: str = KEY, max_bytes: int = 1 << 20) -> PrefixFiles:
    """Save sequences, the last one as last used."""
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20)
    for tokens in sequences:
        add(prefixes, tokens)
    kept = files(directory, key=key, max_bytes=max_bytes)
    kept.save(prefixes)
    return kept


def recalled(directory: Path, tokens: list[int], *, key: str = KEY, room: int = 1 << 20) -> int:
    """Return how many leading tokens a new process gets, checking what they hold."""
    prefixes = PrefixCache(SPEC, max_bytes=room, source=files(directory, key=key).recall)
    length = prefixes.recall(tokens)
    for stored, parts in prefixes.sequences():
        expected = np.cumsum(stored)[:, None, None, None] * np.ones((1, 4, 1, 4))
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    return length


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_what_was_saved_comes_back_as_far_as_a_prompt_goes_along(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4], [9, 9])
    assert recalled(tmp_path, [1, 2, 3, 7, 7]) == 3
    assert recalled(tmp_path, [9, 9, 9]) == 2
    assert recalled(tmp_path, [5]) == 0


def test_nothing_is_read_for_what_is_known_already(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4])
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20, source=files(tmp_path).recall)
    assert prefixes.recall([1, 2, 3, 7], beyond=3) == 0
    assert prefixes.recall([1, 2, 3, 7], beyond=2) == 3


def test_another_package_does_not_get_it_and_leaves_it(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4])
    assert recalled(tmp_path, [1, 2, 3, 4], key="other") == 0
    assert recalled(tmp_path, [1, 2, 3, 4]) == 4


def test_a_file_without_room_in_the_cache_is_not_read_again_and_again(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3, 4])
    assert recalled(tmp_path, [1, 2, 3, 4], room=3 * BYTES) == 0
    full = PrefixCache(SPEC, max_bytes=4 * BYTES, source=files(tmp_path).recall)
    add(full, [8, 8], pinned=True)
    assert full.recall([1, 2, 3, 4]) == 2
    only_file(tmp_path).unlink()
    assert full.recall([1, 2, 3, 4]) == 2


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, 0),
        lambda path: flip(path, 40),
        lambda path: cut(path, 0),
        lambda path: cut(path, 30),
        lambda path: cut(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(b"LAMPKV01" + struct.pack(">I", 2**32 - 1)),
        lambda path: path.write_bytes(b"LAMPKV01" + struct.pack(">I", 1) + b"\xc1"),
    ],
    ids=["values", "magic", "tokens", "empty", "header cut", "values cut", "endless header", "no msgpack"],
)
def test_a_damaged_file_is_never_used_and_goes(tmp_path: Path, damage: object) -> None:
    saved(tmp_path, [1, 2, 3, 4])
    assert callable(damage)
    damage(only_file(tmp_path))
    assert recalled(tmp_path, [1, 2, 3, 4]) == 0
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_never_used(tmp_path: Path) -> None:
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20)
    prefixes.store_filled([1, 2], lambda rows, _: rows.fill(np.nan))
    files(tmp_path).save(prefixes)
    assert recalled(tmp_path, [1, 2, 3]) == 0
    assert not list(tmp_path.iterdir())


def test_tokens_outside_the_vocabulary_are_never_used(tmp_path: Path) -> None:
    saved(tmp_path, [1, 100])
    assert recalled(tmp_path, [1, 100]) == 0
    assert not list(tmp_path.iterdir())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere", [1, 2, 3, 4])
    directory = tmp_path / "prefixes"
    directory.mkdir()
    (directory / "x.prefix").symlink_to(only_file(tmp_path / "elsewhere"))
    assert recalled(directory, [1, 2, 3, 4]) == 0


def test_room_goes_to_the_pinned_and_the_last_used(tmp_path: Path) -> None:
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20)
    add(prefixes, [1, 1, 1], pinned=True)
    add(prefixes, [2, 2, 2])
    add(prefixes, [3, 3, 3])
    files(tmp_path, max_bytes=7 * BYTES).save(prefixes)
    assert [recalled(tmp_path, [token] * 3) for token in (1, 2, 3)] == [3, 0, 3]


def test_older_files_go_when_room_is_needed_whoever_wrote_them(tmp_path: Path) -> None:
    saved(tmp_path, [1, 1, 1], key="older package")
    os.utime(only_file(tmp_path), (1, 1))
    saved(tmp_path, [2, 2, 2], key="old package")
    # Files have a header besides their values.
    saved(tmp_path, [3, 3, 3], max_bytes=3 * BYTES + 3 * BYTES + 200)
    assert recalled(tmp_path, [1, 1, 1], key="older package") == 0
    assert recalled(tmp_path, [2, 2, 2], key="old package") == 3
    assert recalled(tmp_path, [3, 3, 3]) == 3


def test_a_longer_sequence_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    kept = saved(tmp_path, [1, 2])
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20, source=kept.recall)
    add(prefixes, [1, 2, 3])
    kept.save(prefixes)
    assert recalled(tmp_path, [1, 2, 3]) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_again_writes_nothing_anew(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    inode = only_file(tmp_path).stat().st_ino
    saved(tmp_path, [1, 2])
    assert only_file(tmp_path).stat().st_ino == inode


def test_files_are_the_agents_alone_and_interrupted_writes_go(tmp_path: Path) -> None:
    (tmp_path / ".x.prefix.1.tmp").write_bytes(b"rest")
    saved(tmp_path, [1, 2])
    assert only_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_disk_that_refuses_costs_nothing_but_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    prefixes = PrefixCache(SPEC, max_bytes=1 << 20)
    add(prefixes, [1, 2])
    files(tmp_path / "file" / "below").save(prefixes)
    assert "prefixes cannot be kept" in caplog.text
