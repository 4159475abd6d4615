"""Hub ids, against a small server on the loopback interface that speaks what the hub's client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from lamplighter_agent.errors import CheckpointError, ConfigError
from lamplighter_builder.cli import main
from lamplighter_builder.hub import HubId
from lamplighter_builder.sources import open_checkpoint
from support.gguf_files import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one directory as the repository ``owner/tiny``; ``fetched`` are the files that were asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.fetched: list[str] = []
        self.gated = False


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/owner/tiny", "/owner/tiny/resolve/")):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif self.server.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/owner/tiny/tree/"):
            self.answer(200, json.dumps([self.describe(file) for file in self.files()]).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": file.name} for file in self.files()]
            self.answer(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            file = self.server.directory / path.rpartition("/")[2]
            if self.command == "GET":
                self.server.fetched.append(file.name)
            data = file.read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

    def files(self) -> list[Path]:
        return sorted(self.server.directory.iterdir())

    def describe(self, file: Path) -> dict[str, object]:
        digest = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest}

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client use the loopback interface, whatever the environment of the tests says."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model that also has files which must not be fetched."""
    directory = tmp_path / "repository"
    directory.mkdir()
    for file in tiny_checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "modeling_tiny.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "consolidated.safetensors").write_bytes(b"a second copy of the weights")
    server = Hub(directory)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_package_is_built_from_a_hub_id_and_again_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    arguments = ["build", "-m", "owner/tiny", "-p", "int4", "-c", str(cache), "--json"]
    assert main([*arguments, "-o", str(tmp_path / "first")]) == 0
    assert json.loads(capsys.readouterr().out)["package"] == "tiny-int4/1.0.0"
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["provenance"]["source"] == f"owner/tiny@{COMMIT}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
    assert not {"modeling_tiny.py", "pytorch_model.bin", "consolidated.safetensors"} & set(hub.fetched)
    hub.fetched.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main([*arguments, "-o", str(tmp_path / "second")]) == 0
    assert hub.fetched == []
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_gguf_file_of_a_repository_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    original = open_checkpoint(str(hub.directory), None)
    write_gguf(hub.directory / "tiny-Q8_0.gguf", original)  # type: ignore[arg-type]
    found = open_checkpoint(f"owner/tiny/tiny-Q8_0.gguf@{COMMIT}", tmp_path / "cache")
    assert found.name == "tiny-Q8_0"
    assert found.source == f"owner/tiny@{COMMIT}/tiny-Q8_0.gguf"
    assert set(hub.fetched) == {"tiny-Q8_0.gguf", "README.md"}
    with pytest.raises(CheckpointError, match=r"there is no file other\.gguf"):
        open_checkpoint("owner/tiny/other.gguf", tmp_path / "cache")


def test_offline_without_the_model_in_the_cache_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments = ["build", "-m", "owner/tiny", "-p", "int4", "-o", str(tmp_path / "out"), "-c", str(tmp_path / "cache")]
    assert main(arguments) == 10
    message = capsys.readouterr().err
    assert "owner/tiny: is no local directory, and the download failed: it is not, or not completely, in" in message
    assert "the client is offline (HF_HUB_OFFLINE)" in message
    assert not (tmp_path / "out").exists()


def test_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the hub cannot be reached") as caught:
        open_checkpoint("owner/tiny", tmp_path)
    assert "check the network" in str(caught.value.hint)


def test_repository_that_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"owner/other: is no local directory.*no such repository, or it is priv"):
        open_checkpoint("owner/other", tmp_path)


def test_gated_repository_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match="gives access on request only") as caught:
        open_checkpoint("owner/tiny", tmp_path)
    assert "hf auth login" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name", None, None)),
        ("owner/name@v1.0", HubId("owner/name", None, "v1.0")),
        ("owner/name/x-Q4_0.gguf", HubId("owner/name", "x-Q4_0.gguf", None)),
        ("owner/name/sub/x.gguf@refs/pr/1", HubId("owner/name", "sub/x.gguf", "refs/pr/1")),
        ("owner/name/x.bin", None),
        ("../name", None),
        ("name", None),
        ("owner/na me", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected


def test_path_that_is_no_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory, and no hub id either"):
        open_checkpoint(str(tmp_path / "missing"), None)
