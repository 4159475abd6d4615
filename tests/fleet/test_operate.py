"""The operator's tools against a whole agent, a real broker and a real repository; only the engine is a small one."""

from __future__ import annotations

import json
import platform
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamplighter_agent.errors import RequestError, ServiceError
from lamplighter_agent.service.messages import FinalReply, PromptMessage, ReportedMessage
from lamplighter_agent.update.states import PackageRef, TrialLimits, UpdatePolicy, UpdateState
from lamplighter_fleet.broker import Broker, BrokerOptions, connect
from lamplighter_fleet.cli import main
from lamplighter_fleet.devices import FleetView, list_devices
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.prompt import ask_device, ask_group
from lamplighter_fleet.publish import publish_package
from lamplighter_fleet.push import push, push_all
from lamplighter_fleet.repository import Repository
from lamplighter_fleet.terminal import change_line
from lamplighter_fleet.watch import follow
from support.agents import AgentProcess, running_agent
from support.broker import free_port, mosquitto_path, running_broker
from support.package_server import PackageServer
from support.packages import write_package

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]


@dataclass
class Fleet:
    """A broker, a repository with two packages, and one agent.

    Attributes:
        server: Serves the repository.
        settings: The agent's.
        agent: Its process.
        options: How tools reach the broker.
    """

    folder: Path
    server: PackageServer
    settings: list[str]
    agent: AgentProcess
    options: BrokerOptions


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    create_keys(tmp_path / "keys")
    keys = KeyDirectory(tmp_path / "keys")
    repository = Repository(tmp_path / "repository", keys)
    for version in ("1.0.0", "2.0.0"):
        write_package(tmp_path / version, version=version)
        publish_package(tmp_path / version, repository)
    with (
        tempfile.TemporaryDirectory(prefix="ll-") as short,
        running_broker(tmp_path) as broker,
        PackageServer(tmp_path / "repository") as server,
    ):
        (tmp_path / "root.json").write_bytes(keys.root())
        settings = [
            "device.id=box1",
            "device.groups=[lobby]",
            f"state_dir={tmp_path / 'state'}",
            f"repository.url={server.url}",
            f"repository.root_file={tmp_path / 'root.json'}",
            "repository.retries=0",
            f"mqtt.port={broker.port}",
            "mqtt.reconnect_max_s=0.5",
            f"local_api.socket={short}/agent.sock",
        ]
        options = BrokerOptions(port=broker.port)
        with running_agent(tmp_path, settings) as agent:
            wait_until_online(options)
            yield Fleet(tmp_path, server, settings, agent, options)


def wait_until_online(options: BrokerOptions) -> None:
    view = FleetView(options.prefix)
    with connect(options) as broker:
        broker.subscribe(broker.topics("box1").device("status"))
        message = broker.read(30)
        assert message is not None
        view.take(message.topic, message.payload)
    assert view.devices["box1"].online


def ask(broker: Broker, text: str) -> FinalReply:
    replies = list(ask_device(broker, "box1", PromptMessage(prompt=text)))
    final = replies[-1]
    assert isinstance(final, FinalReply)
    assert "".join(reply.text for reply in replies[:-1]) == final.text
    return final


def test_push_ask_restart_push_again(fleet: Fleet) -> None:
    reports: list[ReportedMessage] = []
    with connect(fleet.options) as broker:
        with pytest.raises(RequestError, match="no package is installed"):
            list(ask_device(broker, "box1", PromptMessage(prompt="too early")))
        outcome = push(broker, "box1", PackageRef("tiny", "1.0.0"), progress=reports.append, timeout_s=60)
        assert outcome.state is UpdateState.ACTIVE, outcome
        assert outcome.active == "tiny/1.0.0"
        assert {"downloading", "preparing", "trying", "activating"} <= {report.state.value for report in reports}
        assert ask(broker, "hi").text == "You said: hi"
        assert ask(broker, "hi").model == "tiny/1.0.0"
        (device,) = list_devices(broker)
        assert device.online
        assert device.telemetry is not None
        assert (device.telemetry.package, device.telemetry.worker) == ("tiny/1.0.0", "ready")
        assert device.telemetry.generated_tokens_per_s is not None
        assert fleet.agent.terminate() == 0

        with running_agent(fleet.folder, fleet.settings):
            # The package is taken up again without the repository, and the boot is counted.
            final = wait_for_answer(broker)
            assert final.model == "tiny/1.0.0"
            (device,) = list_devices(broker)
            assert device.status is not None
            assert device.status.boot == 2
            assert push(broker, "box1", PackageRef("tiny", "2.0.0"), timeout_s=60).state is UpdateState.ACTIVE
            group = list(ask_group(broker, "lobby", PromptMessage(prompt="all")))[-1]
            assert isinstance(group, FinalReply)
            assert (group.model, group.device) == ("tiny/2.0.0", "box1")


def wait_for_answer(broker: Broker) -> FinalReply:
    """Ask until the agent is there again; a prompt that meets no package yet is refused at once."""
    for _ in range(100):
        try:
            return ask(broker, "hello again")
        except RequestError as error:
            if error.code != 503:
                raise
    raise AssertionError("the package did not come back")


def test_a_failed_update_is_told_and_leaves_the_package_in_use(fleet: Fleet) -> None:
    with connect(fleet.options) as broker:
        assert push(broker, "box1", PackageRef("tiny", "1.0.0"), timeout_s=60).state is UpdateState.ACTIVE
        limits = UpdatePolicy(limits=TrialLimits(max_peak_rss_bytes=1))
        outcome = push(broker, "box1", PackageRef("tiny", "2.0.0"), policy=limits, timeout_s=60)
        assert (outcome.state, outcome.reason, outcome.active) == (UpdateState.FAILED, "trial_failed", "tiny/1.0.0")
        unknown = push(broker, "box1", PackageRef("tiny", "9.0.0"), timeout_s=60)
        assert (unknown.state, unknown.reason) == (UpdateState.REJECTED, "package_unknown")
        assert ask(broker, "hi").model == "tiny/1.0.0"


def test_a_wrong_blob_is_told_by_file(fleet: Fleet) -> None:
    blobs = fleet.folder / "repository" / "blobs" / "sha256"
    largest = max(blobs.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(largest.read_bytes())
    data[100] ^= 1
    largest.write_bytes(data)
    with connect(fleet.options) as broker:
        outcome = push(broker, "box1", PackageRef("tiny", "1.0.0"), timeout_s=60)
    assert (outcome.state, outcome.reason, outcome.file) == (UpdateState.FAILED, "hash_mismatch", "model.onnx.data")
    assert outcome.active is None


def test_a_wish_reaches_more_devices_than_are_told_at_once(tmp_path: Path) -> None:
    ids = [f"box{number:04}" for number in range(1100)]
    with running_broker(tmp_path) as broker, connect(BrokerOptions(port=broker.port)) as tool:
        outcomes = push_all(tool, ids, PackageRef("tiny", "1"), timeout_s=0.0)
        assert [(each.device, each.report, each.online) for each in outcomes] == [(name, None, None) for name in ids]
        tool.subscribe("lamplighter/v1/device/+/desired")
        told = [message.topic.split("/")[3] for message in tool.read_until_marker(60.0)]
    assert sorted(told) == ids


def test_push_to_nobody_gives_up_and_says_why(fleet: Fleet) -> None:
    with connect(fleet.options) as broker, pytest.raises(ServiceError, match="box9 has never been seen"):
        push(broker, "box9", PackageRef("tiny", "1.0.0"), timeout_s=0.3)


def test_ask_to_nobody_gives_up(fleet: Fleet) -> None:
    with connect(fleet.options) as broker, pytest.raises(ServiceError, match=r"no answer came within 0\.3 s"):
        list(ask_device(broker, "box9", PromptMessage(prompt="hello?"), silence_s=0.3))


def test_a_broker_that_is_away_is_a_service_error() -> None:
    with pytest.raises(ServiceError, match="cannot reach the broker"), connect(BrokerOptions(port=free_port())):
        pass


def test_a_server_that_is_no_broker_is_a_service_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ServiceError, match="did not answer"),
        connect(BrokerOptions(port=server.getsockname()[1], timeout_s=0.5)),
    ):
        pass


def test_a_late_will_does_not_change_the_view() -> None:
    view = FleetView("p")
    view.take("p/device/a/status", b'{"state":"online","boot":2,"connection":1,"agent":"1"}')
    assert view.take("p/device/a/status", b'{"state":"offline","boot":1,"connection":7,"agent":"1"}') is None
    assert view.devices["a"].online
    assert view.take("p/device/a/status", b"\xff") is None
    assert view.take("q/device/a/status", b"{}") is None


def test_push_to_a_group_watch_and_commands_by_the_command_line(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = ["--port", str(fleet.options.port)]
    assert main(["push", "tiny/1.0.0", "--group", "lobby", *broker, "--json"]) == 0
    captured = capsys.readouterr()
    (outcome,) = json.loads(captured.out)
    assert (outcome["device"], outcome["report"]["state"]) == ("box1", "active")
    assert "downloading" in captured.err

    assert main(["push", "tiny/2.0.0", "--all", *broker]) == 0
    assert "tiny/2.0.0 active" in capsys.readouterr().out

    assert main(["push", "tiny/2.0.0", "--group", "nobody", *broker]) == 9
    assert "no device of the group 'nobody'" in capsys.readouterr().err

    assert main(["devices", *broker]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["DEVICE", "STATE", "PACKAGE"]
    assert row.split()[:5] == ["box1", "online", "tiny/2.0.0", "ready", "active"]

    assert main(["command", "identify", "--all", *broker, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["architecture"] == platform.machine()
    assert main(["command", "set_log_level", "--device", "box1", *broker]) == 8
    assert "set_log_level" in capsys.readouterr().err

    assert main(["watch", "--seconds", "0.5", *broker, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(each["device"], each["kind"], each["stored"]) for each in told} == {
        ("box1", "status", True),
        ("box1", "reported", True),
    }


def test_what_happens_is_followed_as_it_comes(fleet: Fleet) -> None:
    view = FleetView(fleet.options.prefix)
    with connect(fleet.options) as watching, connect(fleet.options) as pushing:
        changes = follow(watching, view, device_id="box1", for_s=60)
        stored = next(changes)
        assert stored is not None
        assert (stored.leaf, stored.stored) == ("status", True)
        push(pushing, "box1", PackageRef("tiny", "1.0.0"), timeout_s=60)
        lines = []
        for change in changes:
            if change is not None and (line := change_line(change)) is not None:
                lines.append(line)
                if "tiny/1.0.0 active" in line:
                    break
        states = [line.split()[2].rstrip(",") for line in lines if line.split()[1] == "tiny/1.0.0"]
        assert states[0] == "received"
        assert states[-1] == "active"
        assert any("engine_ready" in line for line in lines)
