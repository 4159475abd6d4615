"""What the doctor finds on boxes that are well and boxes that are not."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lamplighter_agent.config import AgentConfig, LocalApiConfig, MqttConfig, RepositoryConfig, TlsConfig
from lamplighter_agent.errors import ConfigError
from lamplighter_agent.service.certificates import valid_until
from lamplighter_agent.service.doctor import Doctor, Finding
from support.broker import free_port, mosquitto_path, running_broker
from support.certificates import Authority


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "www"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_text("{}")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join(10)


def config_for(tmp_path: Path, **sections: object) -> AgentConfig:
    base = {
        "state_dir": tmp_path / "state",
        "mqtt": MqttConfig(enabled=False),
        "local_api": LocalApiConfig(socket=None),
    }
    return AgentConfig(**{**base, **sections})  # type: ignore[arg-type]


def examined(config: AgentConfig, *checks: str) -> list[Finding]:
    return [finding for finding in Doctor(config).examine() if finding.check in checks]


def test_a_repository_that_answers(tmp_path: Path, server: str) -> None:
    root = tmp_path / "root.json"
    root.write_text("{}")
    config = config_for(tmp_path, repository=RepositoryConfig(url=server, root_file=root))
    (finding,) = examined(config, "repository")
    assert finding.level == "ok"
    assert server in finding.message


def test_a_repository_that_does_not_answer(tmp_path: Path) -> None:
    root = tmp_path / "root.json"
    root.write_text("{}")
    repository = RepositoryConfig(url=f"http://127.0.0.1:{free_port()}/", root_file=root)
    (finding,) = examined(config_for(tmp_path, repository=repository), "repository")
    assert finding.level == "error"


def test_a_missing_root_says_what_to_put_there(tmp_path: Path, server: str) -> None:
    (finding,) = examined(config_for(tmp_path, repository=RepositoryConfig(url=server)), "repository")
    assert (finding.level, finding.advice) == ("error", "put the operator's root.json onto the box")


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_a_broker_that_lets_the_box_in_and_one_that_is_away(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        (finding,) = examined(config_for(tmp_path, mqtt=MqttConfig(port=broker.port)), "broker")
        assert finding.level == "ok"
    (finding,) = examined(config_for(tmp_path, mqtt=MqttConfig(port=free_port(), reconnect_max_s=0.3)), "broker")
    assert finding.level == "error"
    assert "Connection refused" in finding.message


def test_a_secret_that_others_may_read(tmp_path: Path) -> None:
    secret = tmp_path / "mqtt.password"
    secret.write_text("word")
    secret.chmod(0o644)
    mqtt = MqttConfig(enabled=False, username="box1", password_file=secret)
    (finding,) = examined(config_for(tmp_path, mqtt=mqtt), "permissions")
    assert (finding.level, finding.advice) == ("error", f"chmod 600 {secret}")
    secret.chmod(0o600)
    assert examined(config_for(tmp_path, mqtt=mqtt), "permissions")[0].level == "ok"


def test_a_secret_that_is_missing_does_not_end_the_examination(tmp_path: Path) -> None:
    mqtt = MqttConfig(enabled=False, password_file=tmp_path / "none")
    found = examined(config_for(tmp_path, mqtt=mqtt), "permissions", "broker")
    assert [(finding.check, finding.level) for finding in found] == [("permissions", "error"), ("broker", "ok")]


def test_a_certificate_that_ends_soon_and_one_that_is_none(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue("box1")
    tls = TlsConfig(ca_file=authority.path, cert_file=certificate, key_file=key)
    found = examined(config_for(tmp_path, mqtt=MqttConfig(enabled=False, tls=tls)), "certificates")
    assert [finding.level for finding in found] == ["warning", "warning"]
    assert abs(valid_until(certificate) - datetime.now(UTC) - timedelta(days=1)) < timedelta(minutes=5)
    with pytest.raises(ConfigError, match="holds no PEM certificate"):
        valid_until(key)


@pytest.mark.parametrize("cut", [0, 10, 100, 200])
def test_a_damaged_certificate_is_a_config_error(tmp_path: Path, cut: int) -> None:
    certificate, _ = Authority(tmp_path, "ca").issue("box1")
    lines = certificate.read_text().splitlines()
    body = "".join(lines[1:-1])
    certificate.write_text("\n".join([lines[0], body[: cut // 4 * 4], lines[-1]]))
    with pytest.raises(ConfigError):
        valid_until(certificate)


def test_the_box_itself(tmp_path: Path) -> None:
    found = {finding.check: finding for finding in Doctor(config_for(tmp_path)).examine()}
    assert {"cpu", "runtime", "disk", "package", "clock", "repository", "broker"} <= set(found)
    assert found["runtime"].level == "ok"
    assert found["runtime"].message.startswith("onnxruntime ")
    assert found["package"].message.startswith("none yet")
    assert all(finding.advice for finding in found.values() if finding.level != "ok")


def test_every_error_about_a_box_without_its_files_says_what_to_do(tmp_path: Path) -> None:
    none = tmp_path / "none.pem"
    mqtt = MqttConfig(port=1, tls=TlsConfig(ca_file=none, cert_file=none, key_file=none))
    found = examined(config_for(tmp_path, mqtt=mqtt), "certificates", "permissions", "broker")
    assert {finding.check for finding in found} == {"certificates", "permissions", "broker"}
    assert [finding for finding in found if finding.level != "error" or not finding.advice] == []
