"""Downloads that go on where they stopped, checked while they stream. The only module that speaks HTTP.

A repository is not trusted to be honest, alive or fast: every transfer has an upper length, a lowest speed, bounded
retries and a cancel event, and a file is kept only chunk by chunk as the signed manifest has it.
"""

from __future__ import annotations

import copy
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import requests
import urllib3.exceptions

from lamplighter_agent import __version__
from lamplighter_agent.errors import (
    ConfigError,
    DownloadError,
    HashMismatchError,
    HttpError,
    MissingFileError,
    SlowDownloadError,
    TooLongError,
    TruncatedDownloadError,
)
from lamplighter_agent.package.manifest import FileEntry
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.pacing import SpeedLimiter, SpeedMeter
from lamplighter_agent.update.partial import PartialFile, Transfer
from lamplighter_agent.update.sources import BLOCK_BYTES, Source, SourceStream

logger = logging.getLogger(__name__)

_BAD_CHUNK_TRIES: Final = 3
_MAX_REDIRECTS: Final = 5
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_TRY_AGAIN_STATUS: Final = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """How patient and how greedy a download is.

    Attributes:
        timeout_s: Bound on connecting and on silence while reading.
        low_speed_bytes_per_s: A transfer that stays below this rate for ``low_speed_time_s`` is given up; 0: never.
        low_speed_time_s: Length of that time.
        speed_limit_bytes_per_s: Highest rate of all transfers together, or None.
        retries: Further tries after a failure without progress; one verified chunk is progress.
        backoff_s: Delay before the first retry; it doubles with each, with full jitter.
        backoff_max_s: Cap of the delay.
    """

    timeout_s: float = 20.0
    low_speed_bytes_per_s: int = 1024
    low_speed_time_s: float = 60.0
    speed_limit_bytes_per_s: int | None = None
    retries: int = 5
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0


class HttpSource:
    """A repository on a web server.

    Args:
        base_url: Where ``metadata/``, ``targets/`` and ``blobs/`` lie.
        timeout_s: Bound on connecting and on silence while reading.
        ca_file: Private certificate authority, or None for the system's.
        proxy: Proxy URL, or None for the environment's.

    Raises:
        ConfigError: If the URL is not http or https.
    """

    def __init__(
        self, base_url: str, *, timeout_s: float = 20.0, ca_file: Path | None = None, proxy: str | None = None
    ) -> None:
        if urlsplit(base_url).scheme not in {"http", "https"} or not urlsplit(base_url).hostname:
            raise ConfigError(f"repository.url: {base_url!r} is not an http or https address")
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._verify: bool | str = True if ca_file is None else str(ca_file)
        self._proxies = None if proxy is None else {"http": proxy, "https": proxy}
        self._idle: deque[requests.Session] = deque()

    def describe(self, path: str) -> str:
        """Return the file's URL."""
        return f"{self._base_url}/{quote(path, safe='/%')}"

    @contextmanager
    def open(self, path: str, *, offset: int = 0, etag: str | None = None) -> Iterator[SourceStream]:
        """Request a file, from ``offset`` on if the server can; see `Source.open`."""
        url = self.describe(path)
        headers = {"Accept-Encoding": "identity", "User-Agent": f"lamplighter-agent/{__version__}"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if etag is not None:
                headers["If-Range"] = etag
        session = self._take_session()
        with _transport_errors(url):
            response = session.get(
                url,
                headers=headers,
                stream=True,
                timeout=self._timeout_s,
                verify=self._verify,
                proxies=self._proxies,
            )
        with response:
            begin, total = _check_response(response, url, offset)
            yield SourceStream(_read_blocks(response, url), begin, total, _strong_etag(response))
        self._idle.append(session)

    def _take_session(self) -> requests.Session:
        """Return a session that nobody else uses, with its open connection if there is one."""
        try:
            return self._idle.pop()
        except IndexError:
            session = requests.Session()
            session.max_redirects = _MAX_REDIRECTS
            return session


class Downloader:
    """Fetches files of a source, patiently.

    Args:
        source: Where from.
        options: How patient and how greedy.
        interrupt: Set from any thread, it ends every transfer at once, whatever the server does.
    """

    def __init__(
        self, source: Source, options: DownloadOptions = DownloadOptions(), interrupt: Interrupt | None = None
    ) -> None:
        self._source = source
        self._options = options
        self._interrupt = interrupt or Interrupt()
        self._limiter = SpeedLimiter(options.speed_limit_bytes_per_s)

    def until(self, interrupt: Interrupt) -> Downloader:
        """Return the same downloader, with the same speed limit, that another interrupt ends."""
        other = copy.copy(self)
        other._interrupt = interrupt
        return other

    def describe(self, path: str) -> str:
        """Return a file's address as a person knows it."""
        return self._source.describe(path)

    def fetch_bytes(self, path: str, max_bytes: int) -> bytes:
        """Return a small file.

        Args:
            path: Path in the repository.
            max_bytes: Upper bound of its length.

        Raises:
            MissingFileError: If there is no such file.
            TooLongError: If it is longer than ``max_bytes``.
            DownloadError: If it cannot be fetched after the retries.
            UpdateCancelledError: If it was cancelled.
            UpdateDeadlineError: If its time is over.
        """
        return self._interrupt.run(lambda: self._fetch_bytes(path, max_bytes), self.describe(path))

    def _fetch_bytes(self, path: str, max_bytes: int) -> bytes:
        failures = 0
        while True:
            try:
                return self._transfer_bytes(path, max_bytes)
            except DownloadError as error:
                failures += 1
                self._pause_or_raise(error, failures, path)

    def fetch_file(
        self, path: str, entry: FileEntry, destination: Path, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Fetch a file that the manifest lists and put it, verified and durable, at ``destination``.

        When this fails, what was received stays beside it, with ``.part`` added to the name, and the next call goes
        on from there.

        Args:
            path: Path in the repository.
            entry: Length and hashes.
            destination: Where the file goes; its directory exists.
            progress: Called with the bytes that are here, after each block; the count falls when a chunk is refused.

        Raises:
            MissingFileError: If the repository does not have the file.
            HashMismatchError: If a chunk stays wrong after three tries.
            TooLongError: If the server's file is longer than signed.
            TruncatedDownloadError: If the transfer keeps ending early.
            SlowDownloadError: If the transfer keeps falling below the lowest speed.
            DownloadError: If it cannot be fetched for another reason after the retries.
            DiskFullError: If there is no space.
            StoreError: If the file cannot be written.
            UpdateCancelledError: If it was cancelled.
            UpdateDeadlineError: If its time is over.
        """
        transfer = Transfer()
        try:
            self._interrupt.run(
                lambda: self._fetch_file(path, entry, destination, transfer, progress), self.describe(path)
            )
        finally:
            # A transfer that was left behind has looked at the interrupt before every write: none comes after this.
            with transfer.writing:
                pass

    def _fetch_file(
        self, path: str, entry: FileEntry, destination: Path, transfer: Transfer, progress: Callable[[int], None]
    ) -> None:
        with PartialFile(destination.with_name(f"{destination.name}.part"), entry) as partial:
            progress(partial.offset)
            while not partial.complete:
                before = partial.verified_bytes
                try:
                    self._transfer_chunks(path, partial, entry, transfer, progress)
                except HashMismatchError as error:
                    transfer.count_bad_chunk(partial.verified_bytes)
                    logger.warning("%s: %s", self.describe(path), error)
                    if transfer.bad_chunks >= _BAD_CHUNK_TRIES:
                        raise
                except DownloadError as error:
                    transfer.failures = 1 if partial.verified_bytes > before else transfer.failures + 1
                    self._pause_or_raise(error, transfer.failures, path)
            with transfer.writing:
                self._check_cancelled(path)
                partial.finish(destination)

    def _transfer_bytes(self, path: str, max_bytes: int) -> bytes:
        with self._source.open(path) as stream:
            content = bytearray()
            for block in self._paced(stream, path):
                content += block
                if len(content) > max_bytes:
                    raise TooLongError(f"{self.describe(path)}: longer than the {max_bytes} bytes allowed")
            if stream.total_bytes is not None and len(content) < stream.total_bytes:
                raise _truncated(self.describe(path), len(content), stream.total_bytes)
            return bytes(content)

    def _transfer_chunks(
        self,
        path: str,
        partial: PartialFile,
        entry: FileEntry,
        transfer: Transfer,
        progress: Callable[[int], None],
    ) -> None:
        """Open the source once and take what it gives."""
        offset = partial.offset if transfer.use_range else 0
        try:
            opened = self._source.open(path, offset=offset, etag=transfer.etag)
            with opened as stream:
                _check_total(stream, entry, self.describe(path))
                transfer.etag = stream.etag
                skip = partial.offset - stream.offset
                for block in self._paced(stream, path):
                    skipped = min(skip, len(block))
                    skip -= skipped
                    # A server may go on for ever; what lies beyond the signed length is never read.
                    block = block[skipped : skipped + entry.length - partial.offset]
                    with transfer.writing:
                        self._check_cancelled(path)
                        partial.write(block)
                    progress(partial.offset)
                    if partial.complete:
                        return
        except _RangeError:
            transfer.use_range = False
            raise
        raise _truncated(self.describe(path), partial.offset, entry.length)

    def _paced(self, stream: SourceStream, path: str) -> Iterator[bytes]:
        """Pass the blocks on, no faster than allowed, and give up when they come too slowly or not wanted."""
        meter = SpeedMeter(self._options.low_speed_bytes_per_s, self._options.low_speed_time_s)
        self._check_cancelled(path)
        for block in stream.blocks:
            self._check_cancelled(path)
            meter.count(len(block), self.describe(path))
            yield block
            if delay_s := self._limiter.delay_s(len(block)):
                self._interrupt.wait(delay_s)
                meter.excuse(delay_s)
        self._check_cancelled(path)

    def _pause_or_raise(self, error: DownloadError, failures: int, path: str) -> None:
        final = isinstance(error, TooLongError) or (
            isinstance(error, HttpError) and error.status < 500 and error.status not in _TRY_AGAIN_STATUS
        )
        if final or failures > self._options.retries:
            raise error
        cap_s = min(self._options.backoff_max_s, self._options.backoff_s * 2 ** (failures - 1))
        delay_s = random.uniform(0, cap_s)  # noqa: S311 - jitter, not a secret
        logger.info("try %d failed, the next in %.1f s: %s", failures, delay_s, error)
        self._interrupt.wait(delay_s)
        self._check_cancelled(path)

    def _check_cancelled(self, path: str) -> None:
        self._interrupt.check(self.describe(path))


class _RangeError(DownloadError):
    """The server's answer to a range request makes no sense; asking for the whole file may help."""


def _truncated(where: str, received: int, expected: int) -> TruncatedDownloadError:
    return TruncatedDownloadError(f"{where}: the transfer ended after {received} of {expected} bytes")


def _check_total(stream: SourceStream, entry: FileEntry, where: str) -> None:
    """Compare what the source announces with what is signed.

    Raises:
        TooLongError: If it announces more.
        TruncatedDownloadError: If it announces less.
    """
    if stream.total_bytes is None or stream.total_bytes == entry.length:
        return
    if stream.total_bytes > entry.length:
        raise TooLongError(f"{where}: {stream.total_bytes} bytes announced, but {entry.length} are signed")
    raise TruncatedDownloadError(f"{where}: {stream.total_bytes} bytes announced, but {entry.length} are signed")


def _check_response(response: requests.Response, url: str, offset: int) -> tuple[int, int | None]:
    """Return where the body begins and how long the whole file is said to be."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError(f"{url}: the server compresses although it was asked not to")
    if response.status_code == requests.codes.ok:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isascii() and length.isdigit() else None
    if response.status_code == requests.codes.partial_content:
        return offset, _check_content_range(response.headers.get("Content-Range", ""), url, offset)
    if response.status_code in {requests.codes.not_found, requests.codes.gone}:
        raise MissingFileError(f"{url}: the server does not have this file (HTTP {response.status_code})")
    if response.status_code == requests.codes.requested_range_not_satisfiable:
        raise TruncatedDownloadError(f"{url}: the server's file ends before byte {offset} (HTTP 416)")
    raise HttpError(f"{url}: HTTP {response.status_code} {response.reason or ''}".rstrip(), status=response.status_code)


def _check_content_range(header: str, url: str, offset: int) -> int | None:
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if offset == 0 or match is None or int(match[1]) != offset:
        raise _RangeError(f"{url}: asked for the bytes from {offset} on, but the answer has Content-Range {header!r}")
    return None if match[3] == "*" else int(match[3])


def _strong_etag(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else None


def _read_blocks(response: requests.Response, url: str) -> Iterator[bytes]:
    raw: urllib3.response.BaseHTTPResponse = response.raw
    with _transport_errors(url):
        # read1 gives what has arrived instead of waiting for a full block, so that a slow drip is seen.
        while block := raw.read1(BLOCK_BYTES, decode_content=False):
            yield block


@contextmanager
def _transport_errors(url: str) -> Iterator[None]:
    """Turn the errors of requests and urllib3 into ours."""
    try:
        yield
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise SlowDownloadError(f"{url}: no answer in time") from error
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        hint = "for a private certificate authority set repository.ca_file; check the clock too"
        raise DownloadError(f"{url}: the TLS connection is not trusted: {error}", hint=hint) from error
    except (urllib3.exceptions.ProtocolError, requests.exceptions.ChunkedEncodingError) as error:
        raise TruncatedDownloadError(f"{url}: the connection ended in the middle of the transfer") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, OSError) as error:
        # RequestException is an OSError; a bad proxy or certificate file is a plain one.
        raise DownloadError(f"{url}: {error}") from error
    except urllib3.exceptions.HTTPError as error:
        raise DownloadError(f"{url}: {error}") from error
