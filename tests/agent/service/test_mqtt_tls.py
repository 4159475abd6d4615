"""The shipped production configuration on a real mosquitto: TLS, a certificate for each client, topics locked by it."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamplighter_agent.config import AgentConfig, DeviceConfig, MqttConfig, TlsConfig
from lamplighter_agent.errors import ConfigError
from lamplighter_agent.service.credentials import tls_context
from lamplighter_agent.service.worker import WorkerSpec
from support.broker import Broker, TestClient, free_port, mosquitto_path
from support.certificates import Authority
from support.service import running_box

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]

FILES = Path(__file__).parents[3] / "configs" / "mosquitto"
DEVICE = "lamplighter/v1/device/box1"
REPLY = "lamplighter/v1/reply/app1/x"
# Started by root, mosquitto would become another user, who may not look into a test's folder.
STAY_ROOT = "user root\n" if os.geteuid() == 0 else ""


class Site:
    """A broker for a fleet, and the certificates of everybody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder, "ca")
        certificate, key = self.authority.issue("broker", "127.0.0.1")
        certificate.rename(folder / "broker.pem")
        key.replace(folder / "broker.key")
        shutil.copy(FILES / "acl", folder / "acl")
        text = (FILES / "production.conf").read_text().replace("/etc/mosquitto/lamplighter", str(folder))
        self.broker = Broker(folder)
        self.broker.use_config(text.replace("listener 8883", "listener PORT 127.0.0.1") + STAY_ROOT)
        self.broker.start()

    def tls(self, name: str, authority: Authority | None = None) -> TlsConfig:
        certificate, key = (authority or self.authority).issue(name)
        return TlsConfig(ca_file=self.authority.path, cert_file=certificate, key_file=key)

    def client(self, name: str, *topics: str) -> TestClient:
        return TestClient(self.broker.port, *topics, tls=tls_context(MqttConfig(tls=self.tls(name))))

    def config(self, tls: TlsConfig | None) -> AgentConfig:
        mqtt = MqttConfig(port=self.broker.port, tls=tls, reconnect_max_s=0.3)
        return AgentConfig(device=DeviceConfig(id="box1"), mqtt=mqtt)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.broker.kill()


def test_a_box_answers_an_application_and_nobody_else_hears_it(site: Site, spec: WorkerSpec) -> None:
    with running_box(site.config(site.tls("box1")), spec) as box:
        box.wait_until_connected()
        app, stranger = site.client("app1", REPLY), site.client("app2", REPLY, f"{DEVICE}/prompt")
        app.publish(f"{DEVICE}/prompt", json.dumps({"prompt": "hi", "stream": False}), response_topic=REPLY)
        assert json.loads(app.next_on(REPLY).payload)["text"] == "You said: hi"
        stranger.publish(f"{DEVICE}/prompt", "let me in", response_topic=REPLY)
        stranger.publish(f"{DEVICE}/command", json.dumps({"command": "restart_worker"}))
        with pytest.raises(queue.Empty):
            stranger.next(0.3)
        assert box.commands == []
        assert box.requests.counters.accepted == 1
        app.close()
        stranger.close()


def test_the_fleets_command_gets_through(site: Site, spec: WorkerSpec) -> None:
    with running_box(site.config(site.tls("box1")), spec) as box:
        box.wait_until_connected()
        reply = "lamplighter/v1/reply/fleet/c"
        fleet = site.client("fleet", reply)
        fleet.publish(f"{DEVICE}/command", json.dumps({"command": "ping"}), response_topic=reply)
        assert json.loads(fleet.next_on(reply).payload)["message"] == "ping done"
        fleet.close()


@pytest.mark.parametrize("fault", ["no certificate", "a foreign authority's certificate", "no TLS"])
def test_who_cannot_show_a_certificate_of_the_authority_stays_outside(
    site: Site, spec: WorkerSpec, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    tls: TlsConfig | None = TlsConfig(ca_file=site.authority.path)
    if fault == "a foreign authority's certificate":
        tls = site.tls("box1", Authority(tmp_path, "foreign"))
    elif fault == "no TLS":
        tls = None
    with running_box(site.config(tls), spec) as box:
        box.thread.run(_until_refused(caplog))
        assert box.service.connection.connections == 0


async def _until_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(20):
        while "no connection to the broker" not in caplog.text:  # noqa: ASYNC110 (logged by a thread)
            await asyncio.sleep(0.01)


# paho leaves a socket whose handshake failed to the garbage collector, which closes it and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_of_another_authority_is_not_trusted(
    site: Site, spec: WorkerSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = TlsConfig(ca_file=Authority(tmp_path, "foreign").path)
    with running_box(site.config(foreign), spec) as box:
        box.thread.run(_until_refused(caplog))
        assert box.service.connection.connections == 0
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def test_the_password_is_a_credential_of_the_unit(
    tmp_path: Path, spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch()
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "box1", "open sesame"], check=True)
    broker = Broker(tmp_path)
    broker.use_config(f"listener PORT 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\n{STAY_ROOT}")
    broker.start()
    # systemd puts the files of LoadCredential=lamplighter:FOLDER there, each with the name as prefix.
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "lamplighter_mqtt.password").write_text("open sesame\n")
    mqtt = MqttConfig(port=broker.port, username="box1", password_file=Path("mqtt.password"), reconnect_max_s=0.3)
    try:
        with running_box(AgentConfig(device=DeviceConfig(id="box1"), mqtt=mqtt), spec) as box:
            box.wait_until_connected()
            assert box.service.is_connected
    finally:
        broker.kill()


def test_a_credential_that_is_missing_says_where_it_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    config = MqttConfig(port=free_port(), tls=TlsConfig(cert_file=Path("device.pem"), key_file=Path("device.key")))
    with pytest.raises(ConfigError, match=r"mqtt\.tls: the certificates cannot be loaded"):
        tls_context(config)


def test_a_certificate_without_its_key_is_a_config_error(site: Site) -> None:
    config = MqttConfig(tls=TlsConfig(cert_file=site.tls("box9").cert_file))
    with pytest.raises(ConfigError, match="cert_file and key_file go together"):
        tls_context(config)


def test_old_tls_versions_are_off(site: Site) -> None:
    context = tls_context(MqttConfig(tls=site.tls("box8")))
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
