"""Updates on a whole agent over a real broker, with the small engine: what a fleet sees, and what applications see.

With ``-s`` the messages are printed as they come: the transcript of an update and of a rollback.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lamplighter_agent.update.audit import AUDIT_NAME, AuditLog
from lamplighter_fleet.broker import BrokerOptions, connect
from lamplighter_fleet.commands import send_command
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.publish import publish_package
from lamplighter_fleet.repository import Repository
from support.agents import AgentProcess, running_agent
from support.broker import Broker, TestClient, mosquitto_path, running_broker
from support.package_server import Fault, PackageServer
from support.packages import write_package

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]
DEVICE = "lamplighter/v1/device/box1"


class Story:
    """A broker, a repository on a web server, an agent, and somebody who reads all that it says."""

    def __init__(self, folder: Path, short: Path, broker: Broker, server: PackageServer) -> None:
        self.folder, self.short, self.broker, self.server = folder, short, broker, server
        create_keys(folder / "keys")
        self.keys = KeyDirectory(folder / "keys")
        self.watcher = TestClient(broker.port, f"{DEVICE}/reported", f"{DEVICE}/event", f"{DEVICE}/status")
        self.asker = TestClient(broker.port, "lamplighter/v1/reply/app/#")
        self.begun = time.monotonic()

    @contextmanager
    def agent(self, *settings: str) -> Iterator[AgentProcess]:
        lines = [
            "device.id=box1",
            f"state_dir={self.folder / 'state'}",
            f"repository.url={self.server.url}",
            f"repository.root_file={self.keys.path / 'root.json'}",
            "repository.disk_reserve_mb=0",
            f"mqtt.port={self.broker.port}",
            "mqtt.reconnect_max_s=0.5",
            f"local_api.socket={self.short}/agent.sock",
            "updates.probation_failures=2",
            *settings,
        ]
        with running_agent(self.folder, lines) as agent:
            while self.read()[1].get("state") != "online":
                pass
            yield agent

    def publish(self, version: str) -> None:
        package = self.folder / f"package-{version}"
        write_package(package, version=version, weights_seed=int(version[0]))
        publish_package(package, Repository(self.folder / "repository", self.keys))

    def push(self, version: str, **policy: Any) -> None:  # noqa: ANN401 (fields of a policy)
        wish = {"package": "tiny", "version": version, "id": f"push-{version}", "policy": policy, "requested_by": "ops"}
        self.watcher.publish(f"{DEVICE}/desired", json.dumps(wish), retain=True)

    def read(self) -> tuple[str, dict[str, Any]]:
        """Return the next message of the device and print it as a line of the transcript."""
        received = self.watcher.next(40)
        leaf, message = received.topic.rsplit("/", 1)[1], json.loads(received.payload)
        shown = {
            key: message[key]
            for key in ("name", "state", "active", "package", "version", "bytes_done", "reason", "message")
            if message.get(key)
        }
        print(f"{time.monotonic() - self.begun:6.2f} s  {leaf:9} {shown}")  # noqa: T201 (the transcript)
        return leaf, message

    def states(self, last: str) -> list[str]:
        """Return the states that are reported, each once, up to the last."""
        states: list[str] = []
        while states[-1:] != [last]:
            leaf, message = self.read()
            if leaf == "reported" and states[-1:] != [message["state"]]:
                states.append(message["state"])
                self.reported = message
        return states

    def ask(self, prompt: str, request_id: str, **options: Any) -> None:  # noqa: ANN401 (fields of a prompt)
        question = {"prompt": prompt, "id": request_id, "reply_to": f"lamplighter/v1/reply/app/{request_id}", **options}
        self.asker.publish(f"{DEVICE}/prompt", json.dumps(question))

    def answer(self, request_id: str) -> dict[str, Any]:
        """Return the message that ends a request."""
        while True:
            message = json.loads(self.asker.next_on(f"lamplighter/v1/reply/app/{request_id}", 40).payload)
            if message["type"] != "delta":
                ended: dict[str, Any] = message
                return ended

    def close(self) -> None:
        self.watcher.close()
        self.asker.close()


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    (tmp_path / "repository").mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="ll-") as short,
        running_broker(tmp_path) as broker,
        PackageServer(tmp_path / "repository") as server,
    ):
        made = Story(tmp_path, Path(short), broker, server)
        made.publish("1.0.0")
        made.publish("2.0.0")
        yield made
        made.close()


GOOD = ["received", "checking", "downloading", "verifying", "preparing", "trying", "activating", "active"]


def test_update_is_told_step_by_step_and_requests_under_way_are_finished(story: Story) -> None:
    with story.agent() as agent:
        story.push("1.0.0")
        assert story.states("active") == GOOD
        story.ask("/slow", "long", max_tokens=400, stream=False)
        story.ask("hello", "short")
        assert story.answer("short")["model"] == "tiny/1.0.0"
        story.push("2.0.0")
        assert story.states("active") == GOOD
        assert story.reported["active"] == "tiny/2.0.0"
        story.ask("hello", "next")
        assert story.answer("next")["model"] == "tiny/2.0.0"
        finished = story.answer("long")
        assert (finished["type"], finished["usage"]["generated_tokens"]) == ("final", 400)
        assert finished["model"] == "tiny/1.0.0"
        assert agent.terminate() == 0
    events = [entry.event for entry in AuditLog(story.folder / "state" / AUDIT_NAME).read()]
    assert events == ["requested", *GOOD, "requested", *GOOD]


def test_package_that_crashes_in_use_is_rolled_back_by_itself(story: Story) -> None:
    with story.agent() as agent:
        story.push("1.0.0")
        story.states("active")
        story.push("2.0.0")
        story.states("active")
        for number in range(2):
            story.ask("/crash", f"crash{number}", deadline_s=40)
            assert (story.answer(f"crash{number}")["type"], number) == ("error", number)
        assert story.states("rolled_back") == ["rolled_back"]
        assert (story.reported["reason"], story.reported["active"]) == ("probation_failed", "tiny/1.0.0")
        story.ask("hello", "after", deadline_s=40)
        assert story.answer("after")["model"] == "tiny/1.0.0"
        # Pushed again under another id it is refused before a byte is fetched.
        story.server.exchanges.clear()
        wish = {"package": "tiny", "version": "2.0.0", "id": "once more"}
        story.watcher.publish(f"{DEVICE}/desired", json.dumps(wish), retain=True)
        assert story.states("rejected")[-1] == "rejected"
        assert story.reported["detail"] == "failed_before"
        assert story.server.body_bytes("/blobs/") == 0
        assert agent.terminate() == 0


def test_package_that_takes_the_device_down_is_rolled_back_at_the_next_start(story: Story) -> None:
    with story.agent():
        story.push("1.0.0")
        story.states("active")
        story.push("2.0.0")
        story.states("active")
        # Leaving the block kills the agent, as a power cut would.
    with story.agent():
        story.ask("hello", "second")
        assert story.answer("second")["model"] == "tiny/2.0.0"
    with story.agent() as agent:
        assert story.states("rolled_back")[-1] == "rolled_back"
        story.ask("hello", "third")
        assert story.answer("third")["model"] == "tiny/1.0.0"
        assert agent.terminate() == 0


def test_update_is_cancelled_and_rolled_back_by_command(story: Story) -> None:
    with (
        story.agent("repository.low_speed_bytes_per_s=0") as agent,
        connect(BrokerOptions(port=story.broker.port)) as fleet,
    ):
        story.push("1.0.0")
        story.states("active")
        story.server.faults.append(Fault("/blobs/", times=1, drip_s=0.2, drip_bytes=512))
        story.push("2.0.0")
        story.states("downloading")
        assert "cancelled" in send_command(fleet, "box1", "cancel_update")
        assert story.states("cancelled")[-1] == "cancelled"
        assert story.reported["active"] == "tiny/1.0.0"
        wish = {"package": "tiny", "version": "2.0.0", "id": "again"}
        story.watcher.publish(f"{DEVICE}/desired", json.dumps(wish), retain=True)
        story.states("active")
        assert "tiny/1.0.0" in send_command(fleet, "box1", "rollback")
        assert story.states("rolled_back")[-1] == "rolled_back"
        story.ask("hello", "back")
        assert story.answer("back")["model"] == "tiny/1.0.0"
        assert agent.terminate() == 0
