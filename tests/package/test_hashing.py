"""Digests of files, whole and in chunks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lamplighter_agent.errors import HashMismatchError, MissingFileError
from lamplighter_agent.package.hashing import digest_file, verify_file
from lamplighter_agent.package.manifest import FileEntry


def entry(data: bytes, name: str = "weights") -> FileEntry:
    return FileEntry(name=name, role="other", length=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(("length", "chunks"), [(0, 0), (1, 1), (9, 1), (10, 1), (11, 2), (30, 3)])
def test_every_byte_is_in_one_chunk(tmp_path: Path, length: int, chunks: int) -> None:
    data = bytes(range(length))
    (tmp_path / "file").write_bytes(data)
    digest = digest_file(tmp_path / "file", 10)
    assert digest.length == length
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert digest.chunk_sha256 == tuple(hashlib.sha256(data[i * 10 : i * 10 + 10]).hexdigest() for i in range(chunks))


def test_an_unchanged_file_verifies(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"content")
    verify_file(tmp_path / "weights", entry(b"content"))


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"contend")
    with pytest.raises(HashMismatchError, match=r"weights: sha256 is .* but the manifest says"):
        verify_file(tmp_path / "weights", entry(b"content"))


def test_another_length_is_found_without_hashing(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"content and more")
    with pytest.raises(HashMismatchError, match="16 bytes, but the manifest says 7"):
        verify_file(tmp_path / "weights", entry(b"content"))


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="weights"):
        verify_file(tmp_path / "weights", entry(b"content"))


def test_a_link_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"content")
    (tmp_path / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError):
        verify_file(tmp_path / "weights", entry(b"content"))
