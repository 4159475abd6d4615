"""A static web server on a free loopback port that breaks in one programmed way at a time."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

_BLOCK_BYTES = 1024


@dataclass(slots=True)
class Fault:
    """What goes wrong with the files whose path contains ``path``.

    Attributes:
        path: Part of the request path.
        times: How many requests it hits; None for all.
        status: Answer with this status and no file.
        cut_after: Close the connection after this many bytes of body, although more were announced.
        flip_at: Change the byte at this position of the file.
        ignore_range: Send the whole file whatever range is asked for.
        etag: Use this ETag in place of the content's.
        content_range: Send this header in place of the right one.
        announce: Send this Content-Length and no more than the file has.
        endless: Send zeros for ever, without a length.
        drip_s: Wait this long before each ``drip_bytes``.
        drip_bytes: Bytes sent at once while dripping.
        headers: Further headers.
    """

    path: str
    times: int | None = None
    status: int | None = None
    cut_after: int | None = None
    flip_at: int | None = None
    ignore_range: bool = False
    etag: str | None = None
    content_range: str | None = None
    announce: int | None = None
    endless: bool = False
    drip_s: float | None = None
    drip_bytes: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Exchange:
    """One request and what became of it."""

    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    body_bytes: int = 0


class PackageServer:
    """Serves a directory; used as a context manager.

    Args:
        directory: What to serve.
        tls: Serve HTTPS with this context, or None for HTTP.
    """

    def __init__(self, directory: Path, tls: ssl.SSLContext | None = None) -> None:
        self.directory = directory
        self.exchanges: list[Exchange] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._scheme = "http" if tls is None else "https"
        self._http = _Server(("127.0.0.1", 0), self)
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="package-server")

    @property
    def url(self) -> str:
        """Base URL."""
        return f"{self._scheme}://127.0.0.1:{self._http.server_address[1]}"

    def body_bytes(self, path: str) -> int:
        """Return how many bytes of body went out for paths that contain ``path``."""
        return sum(exchange.body_bytes for exchange in self.exchanges if path in exchange.path)

    def requests(self, path: str) -> list[Exchange]:
        """Return the requests whose path contains ``path``."""
        return [exchange for exchange in self.exchanges if path in exchange.path]

    def take_fault(self, path: str) -> Fault | None:
        """Return the fault that hits a request now."""
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> PackageServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, address: tuple[str, int], owner: PackageServer) -> None:
        self.owner = owner
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        owner = self.server.owner
        path = unquote(self.path)
        exchange = Exchange(path, self.headers.get("Range"), self.headers.get("If-Range"))
        with owner.lock:
            owner.exchanges.append(exchange)
        fault = owner.take_fault(path) or Fault(path)
        file = owner.directory / path.lstrip("/")
        if fault.status is not None:
            self._answer_empty(exchange, fault.status)
        elif not file.is_file():
            self._answer_empty(exchange, 404)
        else:
            self._answer_file(exchange, fault, file.read_bytes())

    def _answer_empty(self, exchange: Exchange, status: int) -> None:
        exchange.status = status
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer_file(self, exchange: Exchange, fault: Fault, content: bytes) -> None:
        etag = fault.etag or f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        if fault.flip_at is not None:
            content = content[: fault.flip_at] + bytes([content[fault.flip_at] ^ 1]) + content[fault.flip_at + 1 :]
        begin = self._range_begin(exchange, fault, etag)
        if begin > len(content):
            self._answer_empty(exchange, 416)
            return
        exchange.status = 206 if begin else 200
        self.send_response(exchange.status)
        self.send_header("ETag", etag)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        if begin:
            right = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", fault.content_range or right)
        body = content[begin:]
        if not fault.endless:
            self.send_header("Content-Length", str(len(body) if fault.announce is None else fault.announce))
        self.end_headers()
        self._send_body(exchange, fault, body)

    def _range_begin(self, exchange: Exchange, fault: Fault, etag: str) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", exchange.range or "")
        if match is None or fault.ignore_range or exchange.if_range not in {None, etag}:
            return 0
        return int(match[1])

    def _send_body(self, exchange: Exchange, fault: Fault, body: bytes) -> None:
        if fault.cut_after is not None:
            body = body[: fault.cut_after]
        step = _BLOCK_BYTES if fault.drip_s is None else fault.drip_bytes
        try:
            for offset in range(0, len(body), step):
                if fault.drip_s is not None and self.server.owner.closing.wait(fault.drip_s):
                    return
                exchange.body_bytes += self.wfile.write(body[offset : offset + step])
            while fault.endless and not self.server.owner.closing.is_set():
                exchange.body_bytes += self.wfile.write(bytes(_BLOCK_BYTES))
        except (BrokenPipeError, ConnectionResetError):
            return  # the client has seen enough

    def log_message(self, *_: object) -> None:
        return
