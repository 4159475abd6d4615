"""The whole way of a package through the public commands alone: build, sign, publish, push, answer, roll back.

Everything is a process of its own, as it is on a real box; only the model is tiny.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.broker import TestClient, mosquitto_path, running_broker
from support.package_server import Fault, PackageServer

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

BIN = Path(sys.executable).parent
CONFIG = Path(__file__).parents[2] / "configs" / "agent.yaml"
DEVICE = "lamplighter/v1/device/box1"


def command(program: str, *arguments: str | Path, expect: int = 0) -> str:
    """Run one of our commands to its end and return what it printed."""
    line = [str(BIN / program), *map(str, arguments)]
    result = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert result.returncode == expect, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout + (result.stderr if expect else "")


@dataclass
class World:
    """A repository on a web server, a broker, and an agent that trusts the one and listens to the other."""

    folder: Path
    package: Path
    server: PackageServer
    broker_port: int
    api_socket: Path

    def publish(self, version: str) -> None:
        """Publish the tiny package under another version, with a notice that no other version has."""
        copy = self.folder / f"package-{version}"
        shutil.copytree(self.package, copy)
        notice = f"This is version {version}.\n".encode() * 100
        (copy / "NOTICE").write_bytes(notice)
        manifest = json.loads((copy / "manifest.json").read_text())
        digest = hashlib.sha256(notice).hexdigest()
        manifest["files"].append({"name": "NOTICE", "role": "notice", "length": len(notice), "sha256": digest})
        (copy / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
        command("lamplighter-fleet", "publish", copy, "--repository", self.repository, "--keys", self.folder / "keys")

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def push(self, reference: str, *, expect: int = 0) -> dict[str, Any]:
        """Push and return the last report."""
        arguments = [
            "push",
            reference,
            "--device",
            "box1",
            "--port",
            str(self.broker_port),
            "--timeout",
            "60",
            "--json",
        ]
        output = command("lamplighter-fleet", *arguments, expect=expect)
        report: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        return report

    def ask(self) -> dict[str, Any]:
        """Ask over MQTT and return the final message."""
        arguments = ["prompt", "hello", "--device", "box1", "--port", str(self.broker_port), "--max-tokens", "5"]
        final: dict[str, Any] = json.loads(command("lamplighter-fleet", *arguments, "--json"))
        return final


@pytest.fixture
def world(tmp_path: Path, tiny_package: Path) -> Iterator[World]:
    command("lamplighter-fleet", "keys", "init", tmp_path / "keys")
    with (
        tempfile.TemporaryDirectory(prefix="ll-") as short,
        running_broker(tmp_path) as broker,
        PackageServer(tmp_path / "repository") as server,
        (tmp_path / "agent.log").open("wb") as log,
    ):
        made = World(tmp_path, tiny_package, server, broker.port, Path(short) / "agent.sock")
        made.publish("1.0.0")
        settings = {
            "device.id": "box1",
            "state_dir": tmp_path / "state",
            "repository.url": server.url,
            "repository.root_file": tmp_path / "keys" / "root.json",
            "repository.retries": 0,
            "mqtt.port": broker.port,
            "local_api.socket": made.api_socket,
        }
        line = [str(BIN / "lamplighter-agent"), "run", "--config", str(CONFIG)]
        line += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        watcher = TestClient(broker.port, f"{DEVICE}/status")
        agent = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        try:
            while json.loads(watcher.next(30).payload)["state"] != "online":
                assert agent.poll() is None, (tmp_path / "agent.log").read_text()
            yield made
            agent.terminate()
            assert agent.wait(30) == 0, (tmp_path / "agent.log").read_text()
        finally:
            watcher.close()
            if agent.poll() is None:
                agent.kill()
                agent.wait(10)


def http_post(path: Path, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("POST", url, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_a_package_goes_all_the_way_and_answers_on_both_doors(world: World) -> None:
    report = world.push("tiny/1.0.0")
    assert report["state"] == "active"
    assert report["active"] == "tiny/1.0.0"

    final = world.ask()
    assert final["model"] == "tiny/1.0.0"
    assert final["usage"]["generated_tokens"] <= 5
    assert final["finish_reason"] in {"stop", "length"}

    question = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    status, answer = http_post(world.api_socket, "/v1/chat/completions", question)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == final["text"]

    sample = json.loads(command("lamplighter-agent", "status", "--socket", world.api_socket, "--json"))
    assert sample["package"] == "tiny/1.0.0"
    assert sample["requests_total"] == 2
    assert sample["worker_peak_rss_bytes"] > 0
    devices = json.loads(command("lamplighter-fleet", "devices", "--port", str(world.broker_port), "--json"))
    assert [(device["id"], device["status"]["package"]) for device in devices] == [("box1", "tiny/1.0.0")]


def test_plain_text_from_any_client_is_answered_on_the_device_s_reply_topic(world: World) -> None:
    world.push("tiny/1.0.0")
    client = TestClient(world.broker_port, f"{DEVICE}/reply", v5=False)
    client.publish(f"{DEVICE}/prompt", "hello")
    text, end = "", time.monotonic() + 30
    while time.monotonic() < end:
        message = json.loads(client.next(30).payload)
        if message["type"] == "final":
            assert message["text"] == text
            break
        text += message["text"]
    else:
        pytest.fail("no final message came")
    client.close()


def blob_of(world: World, version: str, name: str) -> str:
    manifest = json.loads((world.folder / f"package-{version}" / "manifest.json").read_text())
    return next(f"blobs/sha256/{entry['sha256']}" for entry in manifest["files"] if entry["name"] == name)


def break_manifest(world: World) -> None:
    """Change the published manifest's bytes without signing them."""
    for path in (world.repository / "targets" / "tiny" / "2.0.0").iterdir():
        path.write_bytes(path.read_bytes().replace(b'"2.0.0"', b'"2.0.1"'))


@pytest.mark.parametrize(
    ("fault", "reason", "file"),
    [
        ({"flip_at": 3}, "hash_mismatch", "NOTICE"),
        ({"status": 404}, "file_missing", "NOTICE"),
        ({"cut_after": 100}, "download_truncated", "NOTICE"),
        (None, "hash_mismatch", "manifest.json"),
    ],
    ids=["wrong hash", "missing file", "truncated download", "manifest changed after signing"],
)
def test_a_bad_package_is_reported_and_the_old_one_goes_on(
    world: World, fault: dict[str, Any] | None, reason: str, file: str
) -> None:
    world.push("tiny/1.0.0")
    world.publish("2.0.0")
    before = world.ask()
    if fault is None:
        break_manifest(world)
    else:
        world.server.faults.append(Fault(blob_of(world, "2.0.0", "NOTICE"), **fault))

    report = world.push("tiny/2.0.0", expect=4)

    assert report["state"] in {"failed", "rejected"}
    assert report["reason"] == reason
    assert file in (report["file"] or "") or file in report["message"]
    assert report["active"] == "tiny/1.0.0"
    assert world.ask()["text"] == before["text"]


def test_a_package_that_nobody_signed_is_refused(world: World) -> None:
    report = world.push("tiny/9.9.9", expect=4)
    assert report["state"] == "rejected"
    assert report["reason"] == "package_unknown"


def test_pull_from_a_directory_brings_a_verified_package_without_running_it(world: World, tmp_path: Path) -> None:
    settings = ["--set", f"state_dir={tmp_path / 'other'}", "--set", f"repository.root_file={tmp_path}/keys/root.json"]
    listed = command("lamplighter-agent", "pull", "--from", world.repository, *settings)
    assert listed.split() == ["tiny/1.0.0"]
    pulled = command("lamplighter-agent", "pull", "tiny/1.0.0", "--from", world.repository, *settings, "--json")
    path = json.loads(pulled)["path"]
    assert "tiny/1.0.0" in command("lamplighter-agent", "verify", path)
    assert not (tmp_path / "other" / "current").exists()
