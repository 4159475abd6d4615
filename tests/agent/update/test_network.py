"""Proxies and private certificate authorities, as they are configured."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamplighter_agent.errors import DownloadError, MissingFileError
from lamplighter_agent.update.downloader import Downloader, DownloadOptions, HttpSource
from support.certificates import Authority
from support.package_server import PackageServer

ONCE = DownloadOptions(timeout_s=5, retries=0)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[PackageServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(b"content")
    with PackageServer(tmp_path / "served") as server:
        yield server


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An HTTPS server and its authority's file."""
    authority = Authority(tmp_path, "our authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("repository", "127.0.0.1"))
    (tmp_path / "secure").mkdir()
    (tmp_path / "secure" / "file").write_bytes(b"secret content")
    with PackageServer(tmp_path / "secure", tls=context) as server:
        yield server.url, authority.path


def test_private_authority_is_trusted_where_it_is_named(secure: tuple[str, Path]) -> None:
    url, authority = secure
    source = HttpSource(url, timeout_s=5, ca_file=authority)
    assert Downloader(source, ONCE).fetch_bytes("file", 100) == b"secret content"


def test_unknown_authority_is_refused_with_what_to_do(secure: tuple[str, Path]) -> None:
    url, _ = secure
    with pytest.raises(DownloadError, match="not trusted") as caught:
        Downloader(HttpSource(url, timeout_s=5), ONCE).fetch_bytes("file", 100)
    assert "repository.ca_file" in (caught.value.hint or "")


def test_authority_file_that_is_not_there_is_told(secure: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = secure
    with pytest.raises(DownloadError, match=r"nowhere\.pem"):
        Downloader(HttpSource(url, timeout_s=5, ca_file=tmp_path / "nowhere.pem"), ONCE).fetch_bytes("file", 100)


def test_requests_go_through_the_proxy(served: PackageServer) -> None:
    source = HttpSource("http://packages.invalid/repository", timeout_s=5, proxy=served.url)
    with pytest.raises(MissingFileError):
        Downloader(source, ONCE).fetch_bytes("file", 100)
    assert [exchange.path for exchange in served.exchanges] == ["http://packages.invalid/repository/file"]


def test_proxy_that_is_away_is_a_download_error(served: PackageServer) -> None:
    source = HttpSource("http://packages.invalid/repository", timeout_s=5, proxy="http://127.0.0.1:9")
    with pytest.raises(DownloadError):
        Downloader(source, ONCE).fetch_bytes("file", 100)
    assert served.exchanges == []
