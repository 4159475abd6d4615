"""The local API against clients that are slow, many, or strangers, and a socket file that goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from lamplighter_agent.config import LocalApiConfig
from lamplighter_agent.errors import ConfigError, ServiceError
from lamplighter_agent.service import local_api_protocol
from lamplighter_agent.service.local_api_protocol import BoundedProtocol
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import free_port
from support.service import ApiBox, running_api


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        yield Path(folder) / "agent.sock"


@pytest.fixture
def api(socket_path: Path, spec: WorkerSpec) -> Iterator[ApiBox]:
    with running_api(LocalApiConfig(socket=socket_path, max_connections=3), spec) as box:
        yield box


def client_of(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=20)


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(path))
    return connection


@pytest.mark.parametrize("begun", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: 1"])
def test_a_client_that_sends_no_whole_header_is_disconnected(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_timeout_s", 0.1)
    with connected(socket_path) as connection:
        connection.sendall(begun)
        assert connection.recv(100) == b""


def test_a_second_request_of_a_connection_must_have_its_header_soon_too(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_timeout_s", 0.3)
    with connected(socket_path) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}]}"):
            answer += connection.recv(1000)
        connection.sendall(b"GET /v1/models HT")
        assert connection.recv(1000) == b""


def test_a_client_that_does_not_read_is_disconnected(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "unread_timeout_s", 0.1)
    body = json.dumps({"prompt": "/count 4000", "stream": True, "max_tokens": 20_000}).encode()
    with connected(socket_path) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        api.thread.run(_until_asked(api))
        api.thread.run(_until_alone(api))
        received = b""
        while data := connection.recv(65536):
            received += data
    assert b"[DONE]" not in received


def test_a_header_that_is_too_large_is_refused(api: ApiBox, socket_path: Path) -> None:
    with connected(socket_path) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Large: " + b"x" * 20_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def asking(path: Path) -> socket.socket:
    """Return a connection on which a long answer is awaited."""
    body = json.dumps({"prompt": "/slow", "stream": True, "max_tokens": 4000}).encode()
    connection = connected(path)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def test_too_many_connections_are_refused_in_openais_shape_and_harm_nobody_else(api: ApiBox, socket_path: Path) -> None:
    held = [asking(socket_path) for _ in range(3)]
    api.thread.run(_until_accepted(api, 3))
    with client_of(socket_path) as http:
        response = http.get("/v1/models")
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
        assert response.json()["error"]["type"] == "server_error"
    for connection in held:
        connection.close()
    api.thread.run(_until_alone(api))
    with client_of(socket_path) as http:
        assert http.get("/v1/models").status_code == 200


async def _until_asked(api: ApiBox) -> None:
    await _until_accepted(api, 1)


async def _until_accepted(api: ApiBox, requests: int) -> None:
    while api.requests.counters.accepted < requests:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"]
)
def test_hundreds_of_connections_that_ask_for_nothing_keep_nobody_out(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(local_api_protocol, "MAX_SILENT", 20)
    monkeypatch.setattr(local_api_protocol, "LATE_S", 0.0)
    held = []
    for _ in range(300):
        held.append(connected(socket_path))
        with contextlib.suppress(BrokenPipeError):  # it has made room already
            held[-1].sendall(sent)
    with client_of(socket_path) as http:
        assert http.get("/v1/models").status_code == 200
        assert api.api.open_connections <= 3 + 20
    for connection in held:
        connection.close()


def test_who_comes_with_many_others_is_answered_or_told_to_come_again(api: ApiBox, socket_path: Path) -> None:
    held = [connected(socket_path) for _ in range(100)]
    body = json.dumps({"prompt": "hi"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for part in (head, body):
        for connection in held:
            with contextlib.suppress(BrokenPipeError):  # it has been told to come again already
                connection.sendall(part)
    answers = {connection.recv(100).split(b" ")[1] for connection in held}
    assert b"200" in answers
    assert answers <= {b"200", b"429", b"503"}
    for connection in held:
        connection.close()


def test_bodies_that_do_not_come_make_room_for_one_that_does(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_api_protocol, "LATE_S", 0.0)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    held = [connected(socket_path) for _ in range(4)]
    for connection in held:
        connection.sendall(head)
    assert held[0].recv(100) == b""  # the fourth took its place
    with client_of(socket_path) as http:
        assert http.post("/v1/completions", json={"prompt": "hi"}).status_code == 200
    for connection in held:
        connection.close()


def test_a_connection_that_is_being_answered_does_not_make_room(
    api: ApiBox, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_api_protocol, "MAX_SILENT", 0)
    with asking(socket_path) as busy:
        received = busy.recv(100)
        idle = [connected(socket_path) for _ in range(10)]
        with client_of(socket_path) as http:
            assert http.get("/v1/models").status_code == 200
        assert received + busy.recv(100) != received
        for connection in idle:
            connection.close()


def test_a_body_that_never_ends_ends_its_connection(api: ApiBox, socket_path: Path) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n"
    with connected(socket_path) as connection:
        connection.sendall(head)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                connection.sendall(b"x" * 65536)
        answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_what_is_no_http_is_answered_in_openais_shape(api: ApiBox, socket_path: Path) -> None:
    head, _, body = answer_to(socket_path, b"\x16\x03\x01 hello\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_compressed_body_is_refused_by_name(api: ApiBox, socket_path: Path) -> None:
    with client_of(socket_path) as http:
        answer = http.post("/v1/completions", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (415, "the content encoding 'gzip' is not known")


def test_a_client_that_offers_another_protocol_is_answered_in_this_one(
    api: ApiBox, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(socket_path) as http:
        answer = http.get("/v1/models", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert answer.status_code == 200
    assert "WebSocket" not in caplog.text


def test_the_log_has_the_path_as_it_was_sent(api: ApiBox, socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lamplighter_agent")
    answer = answer_to(socket_path, b"POST /%1b%5b2J%0aCRITICAL HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert "POST /%1b%5b2J%0aCRITICAL by" in caplog.text


@pytest.mark.parametrize("chunks", [1, 7, 1000])
def test_a_body_in_chunks_and_one_that_is_waited_for_are_read(api: ApiBox, socket_path: Path, chunks: int) -> None:
    body = json.dumps({"prompt": "hi"}).encode()
    step = max(1, len(body) // chunks)
    parts = [body[at : at + step] for at in range(0, len(body), step)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    with connected(socket_path) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        for part in parts:
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")
        assert b"You said: hi" in b"".join(iter(lambda: connection.recv(65536), b""))


def test_requests_that_come_in_one_piece_are_answered_in_order(api: ApiBox, socket_path: Path) -> None:
    one = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
    answer = answer_to(socket_path, (one + b"\r\n") * 50 + one + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 51


async def _until_alone(api: ApiBox) -> None:
    while api.api.open_connections:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_who_asks_is_logged_and_what_is_asked_is_not(
    api: ApiBox, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lamplighter_agent")
    with client_of(socket_path) as http:
        assert http.post("/v1/completions", json={"prompt": "a secret"}).status_code == 200
    assert f"POST /v1/completions by uid:{os.geteuid()}, pid {os.getpid()}" in caplog.text
    assert "secret" not in caplog.text


def test_a_socket_file_that_is_removed_comes_back(api: ApiBox, socket_path: Path) -> None:
    with client_of(socket_path) as before:
        assert before.get("/v1/models").status_code == 200
        socket_path.unlink()
        api.thread.run(api.api.keep_reachable())
        with client_of(socket_path) as after:
            assert after.get("/v1/models").status_code == 200
        assert before.get("/v1/models").status_code == 200


def test_a_foreign_file_in_the_sockets_place_is_left_alone(api: ApiBox, socket_path: Path) -> None:
    socket_path.unlink()
    socket_path.write_text("precious")
    api.thread.run(api.api.keep_reachable())
    assert socket_path.read_text() == "precious"


def test_the_chat_page_is_one_file_that_loads_nothing_else(api: ApiBox, socket_path: Path) -> None:
    with client_of(socket_path) as http:
        page = http.get("/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?:""", page.text)
    assert "v1/chat/completions" in page.text


def test_tcp_clients_need_the_token(socket_path: Path, spec: WorkerSpec) -> None:
    token = socket_path.parent / "token"
    token.write_text("let-me-in\n")
    port = free_port()
    config = LocalApiConfig(socket=None, tcp_port=port, token_file=token)
    with running_api(config, spec), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert http.get("/metrics", headers={"Authorization": "Bearer guess"}).status_code == 401
        assert http.get("/").status_code == 200
        shown = {"Authorization": "Bearer let-me-in"}
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers=shown)
        assert answer.json()["choices"][0]["text"] == "You said: x"


def test_tcp_without_a_token_is_a_config_error(spec: WorkerSpec) -> None:
    with (
        pytest.raises(ConfigError, match="needs local_api"),
        running_api(LocalApiConfig(socket=None, tcp_port=free_port()), None),
    ):
        pass


def test_a_tcp_port_in_use_is_a_service_error(socket_path: Path) -> None:
    (socket_path.parent / "token").write_text("word")
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = LocalApiConfig(
            socket=socket_path, tcp_port=other.getsockname()[1], token_file=socket_path.parent / "token"
        )
        with pytest.raises(ServiceError, match="cannot listen on the loopback's port"), running_api(config, None):
            pass


def answer_to(path: Path, request: bytes) -> bytes:
    """Return all that comes back until the agent closes."""
    with connected(path) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_large_header_that_comes_in_one_piece_is_refused(api: ApiBox, socket_path: Path) -> None:
    answer = answer_to(socket_path, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked",
        b"Content-Length: 6\r\nContent-Length: 7",
        b"Content-Length: -1",
        b"Content-Length: 1e3",
        b"Transfer-Encoding: gzip",
    ],
)
def test_a_body_whose_length_is_in_doubt_is_refused(api: ApiBox, socket_path: Path, header: bytes) -> None:
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    assert answer_to(socket_path, request).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("size", [b"zz", b"-5"])
def test_a_chunk_without_a_size_ends_the_request(api: ApiBox, socket_path: Path, size: bytes) -> None:
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\nx\r\n"
    assert b"400 Bad Request" in answer_to(socket_path, request)


def test_another_model_is_not_tokenized_for(api: ApiBox, socket_path: Path) -> None:
    with client_of(socket_path) as http:
        for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [104]})):
            assert http.post(path, json={**body, "model": "other"}).status_code == 404
            assert http.post(path, json={**body, "model": "default"}).status_code == 200


def test_a_number_of_more_than_64_bits_is_named(api: ApiBox, socket_path: Path) -> None:
    with client_of(socket_path) as http:
        answer = http.post("/v1/completions", json={"prompt": "x", "top_k": int("9" * 400)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_k")
