from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.errors import (
    ConfigError,
    DownloadError,
    HashMismatchError,
    HttpError,
    LamplighterError,
    MissingFileError,
    SlowDownloadError,
    TooLongError,
    TruncatedDownloadError,
    UpdateCancelledError,
)
from lamplighter_agent.package.manifest import FileEntry
from lamplighter_agent.update.downloader import Downloader, DownloadOptions, HttpSource
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.sources import DirectorySource
from support.package_server import Fault, PackageServer
from support.packages import CHUNK_BYTES, file_entry

CHUNKS = 50
LENGTH = CHUNKS * CHUNK_BYTES - 96
CONTENT = random.Random("content").randbytes(LENGTH)
FAST = DownloadOptions(timeout_s=5, retries=2, backoff_s=0.0, low_speed_bytes_per_s=0)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[PackageServer]:
    directory = tmp_path / "served"
    directory.mkdir()
    (directory / "blob").write_bytes(CONTENT)
    with PackageServer(directory) as server:
        yield server


@pytest.fixture
def entry(served: PackageServer) -> FileEntry:
    return msgspec.convert(file_entry(served.directory / "blob", "weights"), FileEntry)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "arrived"


def part_of(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def downloader(
    server: PackageServer, options: DownloadOptions = FAST, interrupt: Interrupt | None = None
) -> Downloader:
    return Downloader(HttpSource(server.url, timeout_s=options.timeout_s), options, interrupt)


def test_file_arrives_whole_and_nothing_else_stays(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    progress: list[int] = []
    downloader(served).fetch_file("blob", entry, destination, progress.append)
    assert destination.read_bytes() == CONTENT
    assert not part_of(destination).exists()
    assert progress == sorted(progress)
    assert progress[-1] == LENGTH


def test_empty_file_arrives(served: PackageServer, destination: Path) -> None:
    (served.directory / "empty").write_bytes(b"")
    entry = msgspec.convert(file_entry(served.directory / "empty", "other"), FileEntry)
    downloader(served).fetch_file("empty", entry, destination)
    assert destination.read_bytes() == b""


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_cut_transfer_goes_on_where_it_stopped(
    served: PackageServer, entry: FileEntry, destination: Path, share: float
) -> None:
    cut = int(LENGTH * share)
    served.faults.append(Fault("blob", times=1, cut_after=cut))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.requests("blob")[1].range == f"bytes={cut}-"
    assert served.body_bytes("blob") == LENGTH


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_next_process_loses_at_most_one_chunk(
    served: PackageServer, entry: FileEntry, destination: Path, share: float
) -> None:
    served.faults += [Fault("blob", times=1, cut_after=int(LENGTH * share)), Fault("blob", times=1, status=403)]
    with pytest.raises(HttpError):
        downloader(served).fetch_file("blob", entry, destination)
    assert not destination.exists()
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.body_bytes("blob") < LENGTH + CHUNK_BYTES


def test_damaged_part_is_cut_back_to_its_last_right_chunk(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    damaged = bytearray(CONTENT[: 30 * CHUNK_BYTES])
    damaged[7 * CHUNK_BYTES + 1] ^= 1
    part_of(destination).write_bytes(bytes(damaged))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.requests("blob")[0].range == f"bytes={7 * CHUNK_BYTES}-"


def test_part_that_is_too_long_is_cut(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    part_of(destination).write_bytes(CONTENT + b"more")
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.exchanges == []


def test_part_that_is_a_link_is_refused(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    victim = destination.with_name("victim")
    victim.write_bytes(b"precious")
    part_of(destination).symlink_to(victim)
    with pytest.raises(LamplighterError) as caught:
        downloader(served).fetch_file("blob", entry, destination)
    assert caught.value.reason == "store"
    assert victim.read_bytes() == b"precious"


def test_file_without_chunk_hashes_arrives(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", times=1, cut_after=LENGTH // 2))
    plain = msgspec.structs.replace(entry, chunk_sha256=())
    downloader(served).fetch_file("blob", plain, destination)
    assert destination.read_bytes() == CONTENT
    assert served.body_bytes("blob") == LENGTH


def test_changed_etag_makes_the_server_begin_anew_and_the_file_is_still_right(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    served.faults.append(Fault("blob", times=1, cut_after=LENGTH // 2, etag='"before"'))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.requests("blob")[1].if_range == '"before"'
    assert served.requests("blob")[1].status == 200


def test_ignored_range_is_noticed(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults += [Fault("blob", times=1, cut_after=LENGTH // 2), Fault("blob", ignore_range=True)]
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT


@pytest.mark.parametrize("header", [f"bytes 0-{LENGTH - 1}/{LENGTH}", "bytes 1-2", "nonsense", ""])
def test_wrong_content_range_is_answered_by_asking_for_the_whole(
    served: PackageServer, entry: FileEntry, destination: Path, header: str
) -> None:
    served.faults += [
        Fault("blob", times=1, cut_after=LENGTH // 2),
        Fault("blob", times=1, content_range=header or " "),
    ]
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.requests("blob")[2].range is None


def test_content_range_of_a_longer_file_is_refused(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults += [
        Fault("blob", times=1, cut_after=CHUNK_BYTES),
        Fault("blob", content_range=f"bytes {CHUNK_BYTES}-{LENGTH}/{LENGTH + 1}"),
    ]
    with pytest.raises(TooLongError):
        downloader(served).fetch_file("blob", entry, destination)


def test_bad_chunk_is_fetched_again_and_not_the_file(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    served.faults.append(Fault("blob", times=1, flip_at=20 * CHUNK_BYTES + 3))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT
    assert served.requests("blob")[1].range == f"bytes={20 * CHUNK_BYTES}-"


def test_chunk_that_stays_bad_is_named(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", flip_at=20 * CHUNK_BYTES + 3))
    with pytest.raises(HashMismatchError, match=r"blob: chunk 21 of 50"):
        downloader(served).fetch_file("blob", entry, destination)
    assert len(served.exchanges) == 3
    assert not destination.exists()
    assert part_of(destination).stat().st_size == 20 * CHUNK_BYTES


def test_manifest_that_contradicts_itself_is_found(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    wrong = msgspec.structs.replace(entry, sha256="0" * 64)
    with pytest.raises(HashMismatchError, match="its chunks are right"):
        downloader(served).fetch_file("blob", wrong, destination)
    assert list(destination.parent.glob("arrived*")) == []


@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        (404, MissingFileError, 1),
        (410, MissingFileError, 1),
        (401, HttpError, 1),
        (403, HttpError, 1),
        (204, HttpError, 1),
        (416, TruncatedDownloadError, 3),
        (429, HttpError, 3),
        (500, HttpError, 3),
        (503, HttpError, 3),
    ],
)
def test_status_is_final_or_tried_again(
    served: PackageServer, entry: FileEntry, destination: Path, status: int, error: type[Exception], requests: int
) -> None:
    served.faults.append(Fault("blob", status=status))
    with pytest.raises(error) as caught:
        downloader(served).fetch_file("blob", entry, destination)
    assert type(caught.value) is error
    assert "/blob" in str(caught.value)
    assert len(served.exchanges) == requests
    assert not destination.exists()


def test_busy_server_is_asked_again(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", times=2, status=503))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT


def test_progress_renews_the_retries(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", times=10, cut_after=CHUNK_BYTES + 1))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT


def test_transfer_that_keeps_ending_early_is_given_up(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    served.faults.append(Fault("blob", cut_after=10))
    with pytest.raises(TruncatedDownloadError, match="in the middle"):
        downloader(served).fetch_file("blob", entry, destination)


def test_shorter_file_on_the_server_is_truncated(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    (served.directory / "blob").write_bytes(CONTENT[:-1])
    with pytest.raises(TruncatedDownloadError, match="announced"):
        downloader(served).fetch_file("blob", entry, destination)


def test_longer_file_on_the_server_is_refused_before_a_byte(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    (served.directory / "blob").write_bytes(CONTENT + b"x")
    with pytest.raises(TooLongError):
        downloader(served).fetch_file("blob", entry, destination)
    assert part_of(destination).stat().st_size == 0
    assert len(served.exchanges) == 1


def test_endless_body_of_a_file_is_left_at_the_signed_length(
    served: PackageServer, entry: FileEntry, destination: Path
) -> None:
    served.faults.append(Fault("blob", endless=True))
    downloader(served).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT


def test_endless_body_of_metadata_is_refused(served: PackageServer) -> None:
    served.faults.append(Fault("blob", endless=True))
    with pytest.raises(TooLongError):
        downloader(served).fetch_bytes("blob", LENGTH + 1000)
    assert len(served.exchanges) == 1


def test_slow_drip_is_given_up(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", drip_s=0.02))
    options = DownloadOptions(timeout_s=5, retries=0, low_speed_bytes_per_s=1000, low_speed_time_s=0.2)
    with pytest.raises(SlowDownloadError, match="less than the 1000 bytes/s"):
        downloader(served, options).fetch_file("blob", entry, destination)


def test_silent_server_is_given_up(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", drip_s=60))
    with pytest.raises(SlowDownloadError, match="no answer in time"):
        downloader(served, DownloadOptions(timeout_s=0.2, retries=0)).fetch_file("blob", entry, destination)


def test_speed_limit_is_kept(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    options = DownloadOptions(speed_limit_bytes_per_s=LENGTH * 4)
    begin_s = time.monotonic()
    downloader(served, options).fetch_file("blob", entry, destination)
    downloader(served, options).fetch_bytes("blob", LENGTH)
    # Two transfers of a quarter of a second; the pause after the very last block may be left out.
    assert time.monotonic() - begin_s > 0.2


def test_cancel_ends_a_transfer_and_keeps_the_part(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", drip_s=0.005, drip_bytes=CHUNK_BYTES))
    interrupt = Interrupt()

    def progress(count: int) -> None:
        if count >= 5 * CHUNK_BYTES:
            interrupt.cancel()

    with pytest.raises(UpdateCancelledError):
        downloader(served, FAST, interrupt).fetch_file("blob", entry, destination, progress)
    assert 5 * CHUNK_BYTES <= part_of(destination).stat().st_size < LENGTH
    assert not destination.exists()


def test_cancel_ends_the_wait_for_a_retry(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", status=503))
    interrupt = Interrupt()
    interrupt.cancel()
    with pytest.raises(UpdateCancelledError):
        downloader(served, DownloadOptions(backoff_s=1000, backoff_max_s=1000), interrupt).fetch_file(
            "blob", entry, destination
        )


def test_compressed_answer_is_refused(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    served.faults.append(Fault("blob", headers={"Content-Encoding": "gzip"}))
    with pytest.raises(DownloadError, match="compresses"):
        downloader(served).fetch_file("blob", entry, destination)


def test_server_that_is_not_there_is_a_download_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DownloadError, match=url):
            Downloader(HttpSource(url), FAST).fetch_bytes("blob", 10)


@pytest.mark.parametrize("url", ["ftp://host/x", "host/x", "http://", "file:///etc"])
def test_address_that_is_no_web_address_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"repository\.url"):
        HttpSource(url)


def test_directory_serves_from_any_offset(served: PackageServer, entry: FileEntry, destination: Path) -> None:
    part_of(destination).write_bytes(CONTENT[: 9 * CHUNK_BYTES])
    Downloader(DirectorySource(served.directory), FAST).fetch_file("blob", entry, destination)
    assert destination.read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "", "a//b", "none", "blob/x"])
def test_directory_has_nothing_outside_itself(served: PackageServer, path: str) -> None:
    (served.directory.parent / "secret").write_bytes(b"secret")
    with pytest.raises(MissingFileError):
        Downloader(DirectorySource(served.directory), FAST).fetch_bytes(path, 100)


def test_pipe_in_a_directory_does_not_stop_the_agent(served: PackageServer) -> None:
    os.mkfifo(served.directory / "pipe")
    with pytest.raises(MissingFileError, match="not a regular file"):
        Downloader(DirectorySource(served.directory), FAST).fetch_bytes("pipe", 100)
