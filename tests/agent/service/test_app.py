"""The agent as a process: start, signals, service manager, faults around it."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from lamplighter_agent.service.starts import StartCounter
from lamplighter_agent.update.states import PackageRef
from lamplighter_agent.update.store import Store
from support.agents import running_agent
from support.broker import TestClient, free_port, mosquitto_path, running_broker
from support.packages import write_package

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
STATUS = "lamplighter/v1/device/box1/status"


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        yield Path(folder)


@pytest.fixture
def notify(short: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short / "notify"))
        manager.settimeout(20)
        yield manager


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory in which ``tiny/1.0.0`` is in use."""
    package = tmp_path / "package"
    manifest = write_package(package)
    store = Store(tmp_path / "state", reserve_bytes=0)
    with store.lock():
        for entry in manifest.files:
            blob = store.blobs.path(entry)
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(package / entry.name, blob)
        store.stage((package / "manifest.json").read_bytes())
        store.activate(PackageRef("tiny", "1.0.0"))
    return store.root


def settings(state: Path, short: Path, port: int | None = None) -> list[str]:
    mqtt = ["mqtt.enabled=false"] if port is None else [f"mqtt.port={port}", "mqtt.reconnect_max_s=0.5"]
    return ["device.id=box1", f"state_dir={state}", f"local_api.socket={short}/agent.sock", *mqtt]


def read_until(manager: socket.socket, wanted: str) -> list[str]:
    """Read the agent's words to the service manager until one of them is ``wanted``."""
    said: list[str] = []
    while wanted not in said:
        said += manager.recv(4096).decode().splitlines()
    return said


def ask(short: Path, path: str = "/health") -> httpx2.Response:
    transport = httpx2.HTTPTransport(uds=str(short / "agent.sock"))
    with httpx2.Client(transport=transport, base_url="http://localhost", timeout=20) as client:
        if path == "/health":
            return client.get(path)
        return client.post(path, json={"prompt": "hi"})


def test_it_is_ready_when_the_package_answers_and_says_when_it_stops(
    tmp_path: Path, state: Path, short: Path, notify: socket.socket
) -> None:
    environment = {"NOTIFY_SOCKET": str(short / "notify"), "WATCHDOG_USEC": "600000"}
    with running_agent(tmp_path, settings(state, short), environment) as agent:
        said = read_until(notify, "READY=1")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in said)
        health = ask(short).json()
        assert (health["status"], health["worker"], health["package"]) == ("ok", "ready", "tiny/1.0.0")
        read_until(notify, "WATCHDOG=1")
        assert agent.terminate() == 0
        read_until(notify, "STOPPING=1")
    assert not (short / "agent.sock").exists()
    assert (state / "boot").read_text() == "1"


def test_the_agent_answers_on_its_socket_while_the_broker_is_away(
    tmp_path: Path, state: Path, short: Path, notify: socket.socket
) -> None:
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with running_agent(tmp_path, settings(state, short, free_port()), environment) as agent:
        read_until(notify, "READY=1")
        assert ask(short, "/v1/completions").json()["choices"][0]["text"] == "You said: hi"
        assert agent.terminate() == 0


def test_without_a_package_it_runs_and_says_so(tmp_path: Path, short: Path, notify: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with running_agent(tmp_path, settings(tmp_path / "new", short), environment) as agent:
        assert any("no package" in line for line in read_until(notify, "READY=1") + read_status(notify))
        assert ask(short).status_code == 503
        assert ask(short, "/v1/completions").status_code == 503
        assert agent.terminate() == 0


def read_status(manager: socket.socket) -> list[str]:
    manager.setblocking(False)
    try:
        return manager.recv(4096).decode().splitlines()
    except BlockingIOError:
        return []


def test_a_killed_worker_comes_back(tmp_path: Path, state: Path, short: Path, notify: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with running_agent(tmp_path, settings(state, short), environment) as agent:
        read_until(notify, "READY=1")
        (worker,) = psutil.Process(agent.pid).children()
        worker.kill()
        said: list[str] = []
        while not any("engine ready" in line for line in said):
            said = notify.recv(4096).decode().splitlines()
        assert ask(short, "/v1/completions").json()["choices"][0]["text"] == "You said: hi"
        assert worker.pid not in [child.pid for child in psutil.Process(agent.pid).children()]


@pytest.mark.skipif(not FAKETIME, reason="libfaketime is not installed")
def test_a_clock_that_jumps_ends_no_answer_and_starves_no_watchdog(
    tmp_path: Path, state: Path, short: Path, notify: socket.socket
) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    environment = {
        "NOTIFY_SOCKET": str(short / "notify"),
        "WATCHDOG_USEC": "600000",
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with running_agent(tmp_path, settings(state, short), environment) as agent:
        read_until(notify, "READY=1")
        years = []
        for jump in ("+10y", "-20y", "+0"):
            clock.write_text(f"{jump}\n")
            read_until(notify, "WATCHDOG=1")
            answer = ask(short, "/v1/completions").json()
            assert answer["choices"][0]["finish_reason"] == "stop"
            years.append(time.gmtime(answer["created"]).tm_year - time.gmtime().tm_year)
        assert agent.terminate() == 0
    assert [round(year, -1) for year in years] == [10, -20, 0]


def test_the_worker_ends_when_the_agent_is_killed(
    tmp_path: Path, state: Path, short: Path, notify: socket.socket
) -> None:
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with running_agent(tmp_path, settings(state, short), environment) as agent:
        read_until(notify, "READY=1")
        (worker,) = psutil.Process(agent.pid).children()
        agent.kill()
        worker.wait(10)
    # The socket's file stays, and the next start replaces it.
    assert (short / "agent.sock").exists()
    with running_agent(tmp_path, settings(state, short), environment) as again:
        read_until(notify, "READY=1")
        assert ask(short).status_code == 200
        assert again.terminate() == 0


def test_a_socket_in_use_ends_it_with_the_service_status(tmp_path: Path, state: Path, short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short / "agent.sock"))
        other.listen()
        with running_agent(tmp_path, settings(state, short)) as agent:
            assert agent.wait() == 9
            assert "another process listens on" in agent.log.read_text()


def test_it_serves_on_the_socket_that_the_service_manager_made(tmp_path: Path, state: Path, short: Path) -> None:
    launcher = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'support.run_agent', '', *sys.argv[2:]])\n"
    )
    path = short / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        arguments = [sys.executable, "-c", launcher, str(listener.fileno()), *settings(state, short)]
        with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=(listener.fileno(),)) as process:
            try:
                assert ask(short, "/v1/completions").json()["choices"][0]["text"] == "You said: hi"
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            finally:
                process.kill()
    assert path.exists()  # it is the service manager's


def test_an_agent_that_does_not_stay_up_ends_in_safe_mode_and_says_why(
    tmp_path: Path, state: Path, short: Path, notify: socket.socket
) -> None:
    for _ in range(6):
        StartCounter(state)
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with running_agent(tmp_path, settings(state, short), environment) as agent:
        said = read_until(notify, "READY=1")
        assert any("safe mode" in line for line in said)
        response = ask(short, "/v1/completions")
        assert response.status_code == 503
        assert "the agent ended early 6 times in a row" in response.json()["error"]["message"]
        assert psutil.Process(agent.pid).children() == []
        assert agent.terminate() == 0
    # It was stopped in order: the next start tries the package again.
    with running_agent(tmp_path, settings(state, short), environment):
        read_until(notify, "READY=1")
        assert ask(short).json()["package"] == "tiny/1.0.0"


def test_a_state_directory_that_cannot_be_made_ends_it_with_the_store_status(tmp_path: Path, short: Path) -> None:
    (tmp_path / "file").touch()
    with running_agent(tmp_path, settings(tmp_path / "file" / "state", short)) as agent:
        assert agent.wait() == 6


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_a_killed_agent_is_offline_by_its_will_and_a_new_one_counts_on(
    tmp_path: Path, state: Path, short: Path
) -> None:
    with running_broker(tmp_path) as broker:
        watcher = TestClient(broker.port, STATUS)
        with running_agent(tmp_path, settings(state, short, broker.port)) as agent:
            assert json.loads(watcher.next(30).payload)["state"] == "online"
            agent.kill()
        while (status := json.loads(watcher.next(30).payload))["state"] == "online":
            assert status["boot"] == 1
        assert (status["boot"], status["reason"]) == (1, "connection_lost")
        with running_agent(tmp_path, settings(state, short, broker.port)):
            status = json.loads(watcher.next(30).payload)
            assert (status["state"], status["boot"]) == ("online", 2)
        watcher.close()


def test_serve_answers_and_ends_on_a_signal(fake_package: Path, short: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lamplighter_agent.service import app, serve\n"
        "from lamplighter_agent.engine.options import EngineOptions; from support import fake_engine\n"
        "engine = app.EngineModules(load=fake_engine.ENTRY)\n"
        "sys.exit(serve.serve(Path(sys.argv[1]), Path(sys.argv[2]), EngineOptions(), engine=engine))\n"
    )
    arguments = [sys.executable, "-c", code, str(fake_package), str(short / "agent.sock")]
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL) as process:
        try:
            wait_for_socket(short / "agent.sock")
            assert ask(short, "/v1/completions").json()["model"] == "fake/1"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def wait_for_socket(path: Path) -> None:
    """Wait until somebody listens; a client that connects then is answered when the package is loaded."""
    end = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                assert time.monotonic() < end, "nobody listens"
                time.sleep(0.01)  # there is nothing to wait on
            else:
                return


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_commands_do_what_they_say(tmp_path: Path, state: Path, short: Path, notify: socket.socket) -> None:
    reply, topic = "lamplighter/v1/reply/fleet/1", "lamplighter/v1/device/box1"
    environment = {"NOTIFY_SOCKET": str(short / "notify")}
    with (
        running_broker(tmp_path) as broker,
        running_agent(tmp_path, settings(state, short, broker.port), environment) as agent,
    ):
        read_until(notify, "READY=1")
        fleet = TestClient(broker.port, reply)

        def command(**fields: str) -> dict[str, Any]:
            fleet.publish(f"{topic}/command", json.dumps(fields), response_topic=reply)
            answer: dict[str, Any] = json.loads(fleet.next_on(reply).payload)
            return answer

        while not command(command="ping")["message"].endswith("broker connected, update idle"):
            pass
        assert command(command="identify")["data"]["architecture"] == platform.machine()
        assert ask(short).json()["identify"] is True
        assert command(command="clear_caches")["data"] == {"freed_bytes": 1000}
        assert command(command="clear_caches")["data"] == {"freed_bytes": 0}
        assert command(command="set_log_level")["param"] == "level"
        assert command(command="set_log_level", level="debug")["type"] == "result"
        (worker,) = psutil.Process(agent.pid).children()
        assert command(command="restart_worker")["message"] == "the engine is starting anew"
        worker.wait(10)
        assert ask(short, "/v1/completions").json()["choices"][0]["text"] == "You said: hi"
        found = command(command="collect_diagnostics")["data"]
        assert found["installed"] == ["tiny/1.0.0"]
        assert found["settings"]["device"]["id"] == "box1"
        assert any("the log level is debug" in line for line in found["log"])
        fleet.close()
        assert agent.terminate() == 0
