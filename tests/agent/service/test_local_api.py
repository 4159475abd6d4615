"""The local API over its real socket: the official client, curl, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from lamplighter_agent.config import LocalApiConfig
from lamplighter_agent.errors import ConfigError, ServiceError
from lamplighter_agent.service import unix_socket
from lamplighter_agent.service.worker import WorkerSpec
from support.service import ApiBox, running_api


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path that is short enough for a socket, wherever the test's own folder lies."""
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        yield Path(folder) / "agent.sock"


@pytest.fixture
def api(socket_path: Path, spec: WorkerSpec) -> Iterator[ApiBox]:
    with running_api(LocalApiConfig(socket=socket_path, max_body_bytes=100_000), spec) as box:
        yield box


@pytest.fixture
def http(api: ApiBox, socket_path: Path) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(socket_path))
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=20) as client:
        yield client


@pytest.fixture
def client(http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "You said: hi"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "fake/1"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 12, 14)


def test_the_openai_client_streams_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "/count 30"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == " ".join(map(str, range(1, 31)))
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text)


def test_options_reach_the_engine(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["zzz"],
        user="someone",
        extra_body={"top_k": 40, "min_p": 0.1},
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("You", "length")


def test_completions_continue_text_and_tokens(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="abc", max_tokens=30).choices[0].text == "You said: abc"
    stream = client.completions.create(model="fake", prompt=[97, 98], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "You said: ab"


def test_curl_works(api: ApiBox, socket_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True})
    url = "http://localhost/v1/chat/completions"
    done = subprocess.run(
        [curl, "-sSN", "--unix-socket", str(socket_path), url, "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        check=True,
        timeout=20,
    )
    lines = [line.removeprefix(b"data: ") for line in done.stdout.splitlines() if line]
    assert lines[-1] == b"[DONE]"
    assert "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == "You said: hi"


def test_models_health_tokenize_status_and_metrics(http: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "fake/1"]
    assert client.models.retrieve("fake/1").owned_by == "lamplighter"
    health = {"status": "ok", "worker": "ready", "package": "fake/1", "identify": False, "memory": None}
    assert http.get("/health").json() == health
    assert http.post("/tokenize", json={"prompt": "abc"}).json() == {"tokens": [97, 98, 99], "count": 3}
    assert http.post("/detokenize", json={"tokens": [97, 98, 99]}).json() == {"prompt": "abc"}
    refused = http.post("/detokenize", json={"tokens": [97, 2**40]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    http.post("/v1/completions", json={"prompt": "abc"})
    status = http.get("/status").json()
    assert (status["requests_total"], status["generated_tokens_total"]) == (1, 13)
    assert status["worker_peak_rss_bytes"] >= status["worker_rss_bytes"] > 1_000_000
    text = http.get("/metrics").text
    assert "\nlamplighter_generated_tokens_total 13\n" in text
    assert 'lamplighter_info{agent="' in text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"\xff", 400, None),
        (b'{"messages": 1}', 400, "messages"),
        (b'{"messages": [], "tempature": 1}', 400, "tempature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}', 404, "model"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 65}', 400, "n"),
        (b'{"messages": [{"role": "user", "content": "/refuse"}]}', 400, "prompt"),
        (b'{"messages": [{"role": "user", "content": "/refuse"}], "stream": true}', 400, "prompt"),
        (b'{"messages": [{"role": "user", "content": "/fail"}]}', 500, None),
        (b'{"messages": [{"role": "user", "content": "/contradict"}]}', 400, "banned_words"),
        (b'{"messages": [{"role": "user", "content": "/crash"}]}', 503, None),
        (b'{"messages":' + b"[" * 40_000, 400, None),
        (b" " * 200_000, 413, None),
    ],
    ids=lambda value: value[:60].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_errors_have_openais_shape(http: httpx.Client, body: bytes, status: int, param: str | None) -> None:
    response = http.post("/v1/chat/completions", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


def test_unknown_paths_and_methods_have_openais_shape(http: httpx.Client) -> None:
    error = http.post("/v1/responses").json()["error"]
    assert error["message"].startswith(
        "POST /v1/responses is not served here: Not Found; what is: /v1/chat/completions,"
    )
    refused = http.get("/v1/chat/completions")
    assert (refused.status_code, refused.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(api: ApiBox, socket_path: Path, stream: bool) -> None:
    body = json.dumps({"prompt": "/slow", "stream": stream, "max_tokens": 4000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(socket_path))
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            api.thread.run(_until_active(api))
    api.wait_until_idle()  # the answer itself would take forty seconds
    assert api.requests.counters.generated_tokens < 1000


async def _until_active(api: ApiBox) -> None:
    while not api.requests.active:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_a_full_queue_is_429_with_retry_after(api: ApiBox, http: httpx.Client, socket_path: Path) -> None:
    body = json.dumps({"prompt": "/slow", "max_tokens": 4000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = []
    for _ in range(4):  # two slots, a queue of two
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(socket_path))
        connection.sendall(head + body)
        connections.append(connection)
    api.thread.run(_until_full(api))
    response = http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    for connection in connections:
        connection.close()


async def _until_full(api: ApiBox) -> None:
    while api.requests.depth < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def test_without_a_package_prompts_are_503_and_say_why(socket_path: Path) -> None:
    with running_api(LocalApiConfig(socket=socket_path), None):
        transport = httpx.HTTPTransport(uds=str(socket_path))
        with httpx.Client(transport=transport, base_url="http://localhost") as http:
            response = http.post("/v1/completions", json={"prompt": "x"})
            assert response.status_code == 503
            assert "no package is installed" in response.json()["error"]["message"]
            assert http.get("/health").status_code == 503
            assert http.get("/v1/models").json()["data"] == []


def test_the_socket_has_its_mode_and_goes_at_the_end(socket_path: Path) -> None:
    with running_api(LocalApiConfig(socket=socket_path, mode="0600"), None):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert not socket_path.exists()


def test_a_stale_socket_is_replaced(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    with unix_socket.listen(socket_path, mode=0o660, group=None), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path))
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o660


def test_a_socket_in_use_is_an_error_that_says_so(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(socket_path))
        living.listen()
        with pytest.raises(ServiceError, match="another process listens on"):
            unix_socket.listen(socket_path, mode=0o660, group=None)


def test_a_file_in_the_sockets_place_is_left_alone(socket_path: Path) -> None:
    socket_path.write_text("precious")
    with pytest.raises(ServiceError, match="is not a socket"):
        unix_socket.listen(socket_path, mode=0o660, group=None)
    assert socket_path.read_text() == "precious"


def test_a_path_that_is_too_long_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the kernel takes 107"):
        unix_socket.listen(tmp_path / ("x" * 120), mode=0o660, group=None)


def test_an_unknown_group_is_a_config_error(socket_path: Path) -> None:
    with pytest.raises(ConfigError, match="no group 'nobody-at-all'"):
        unix_socket.listen(socket_path, mode=0o660, group="nobody-at-all")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_a_service_error() -> None:
    with pytest.raises(ServiceError):
        unix_socket.listen(Path("/proc/agent.sock"), mode=0o660, group=None)
