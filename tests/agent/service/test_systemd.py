"""What is said to the service manager, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import uuid

import pytest

from lamplighter_agent.service.systemd import ServiceManager, passed_sockets


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_messages_reach_the_service_manager(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = f"lamplighter-test-{uuid.uuid4().hex}"
    address = f"@{name}" if kind == "abstract" else str(tmp_path_factory.mktemp("n") / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}" if kind == "abstract" else address)
        receiver.settimeout(5)
        manager = ServiceManager.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000"})
        assert manager.watchdog_s == 3.0
        manager.ready("all\nwell")
        manager.status("busy")
        manager.extend_timeout(1.5)
        manager.alive()
        manager.stopping()
        assert [receiver.recv(1000) for _ in range(5)] == [
            b"READY=1\nSTATUS=all well",
            b"STATUS=busy",
            b"EXTEND_TIMEOUT_USEC=1500000",
            b"WATCHDOG=1",
            b"STOPPING=1",
        ]


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    environment = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert ServiceManager.from_environment(environment).watchdog_s is None


def test_without_a_service_manager_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager.from_environment({}).ready("nobody listens")
    assert caplog.text == ""


def test_a_service_manager_that_is_gone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager("/nonexistent/notify").alive()
    assert "cannot notify the service manager" in caplog.text


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    assert passed_sockets({"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + 1)}) == []
    assert passed_sockets({}) == []
