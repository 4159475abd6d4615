"""The shipped broker files on a real mosquitto: what the ACL forbids does not get through, and agents work under it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.broker import Broker, TestClient, mosquitto_path, running_broker

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

FILES = Path(__file__).parents[3] / "configs" / "mosquitto"
# The user name comes from the certificate in production.conf; here the client just says it.
# A broker that root starts would become another user before it reads the file, which may lie in root's own folder.
CONFIG = f"user {getpass.getuser()}\nlistener PORT 127.0.0.1\nallow_anonymous true\nacl_file {FILES / 'acl'}\n"
ROOT = "lamplighter/v1"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running_broker(tmp_path_factory.mktemp("acl"), CONFIG) as running:
        yield running


ALLOWED = [
    ("box1", "device/box1/status", "fleet"),
    ("box1", "device/box1/status", "app1"),
    ("box1", "device/box1/reported", "fleet"),
    ("box1", "device/box1/telemetry", "fleet"),
    ("box1", "device/box1/reply", "fleet"),
    ("box1", "reply/app1/x", "app1"),
    ("app1", "device/box1/prompt", "box1"),
    ("app1", "device/box1/cancel", "box1"),
    ("app1", "group/lobby/prompt", "box1"),
    ("fleet", "device/box1/desired", "box1"),
    ("fleet", "device/box1/command", "box1"),
]
FORBIDDEN = [
    ("box1", "device/box2/status", "fleet"),
    ("box1", "device/box2/reported", "fleet"),
    ("box1", "device/box2/command", "box2"),
    ("box1", "device/box2/prompt", "box2"),
    ("box1", "device/box1/desired", "box1"),
    ("app1", "device/box1/desired", "box1"),
    ("app1", "device/box1/command", "box1"),
    ("app1", "device/box1/status", "fleet"),
    ("app2", "device/box1/prompt", "box1"),
    ("app1", "device/box1/prompt", "box2"),
    ("box1", "reply/app1/x", "app2"),
    ("box1", "device/box1/telemetry", "app1"),
    ("fleet", "device/box1/desired", "app1"),
]


def gets_through(broker: Broker, sender: str, topic: str, receiver: str) -> bool:
    """Send a message, then one that the receiver surely gets; see whether the first arrived before it."""
    reads = {"fleet": "device/box1/status", "app1": "device/box1/status", "app2": "reply/app2/marker"}
    marker = reads.get(receiver, f"device/{receiver}/desired")
    marker_sender = {"fleet": "box1", "app1": "box1", "app2": "box1"}.get(receiver, "fleet")
    ear = TestClient(broker.port, f"{ROOT}/#", username=receiver)
    mouth = TestClient(broker.port, username=sender)
    trusted = TestClient(broker.port, username=marker_sender)
    try:
        mouth.publish(f"{ROOT}/{topic}", "tested")
        trusted.publish(f"{ROOT}/{marker}", "marker")
        arrived = ear.next()
        return arrived.payload == b"tested"
    finally:
        for client in (ear, mouth, trusted):
            client.close()


@pytest.mark.parametrize(("sender", "topic", "receiver"), ALLOWED)
def test_what_the_acl_allows_arrives(broker: Broker, sender: str, topic: str, receiver: str) -> None:
    assert gets_through(broker, sender, topic, receiver)


@pytest.mark.parametrize(("sender", "topic", "receiver"), FORBIDDEN)
def test_what_the_acl_forbids_does_not_get_through(broker: Broker, sender: str, topic: str, receiver: str) -> None:
    assert not gets_through(broker, sender, topic, receiver)
