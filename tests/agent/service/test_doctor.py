"""What the doctor finds on boxes that are well and boxes that are not."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lamplighter_agent.config import AgentConfig, EngineConfig, LocalApiConfig, MqttConfig, RepositoryConfig, TlsConfig
from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.service.certificates import valid_until
from lamplighter_agent.service.doctor import Doctor
from lamplighter_agent.service.doctor_broker import advice_for
from lamplighter_agent.service.findings import Finding
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


@pytest.fixture
def stored(tmp_path: Path, tiny_package: Path) -> Path:
    """Return the directory of a package that is in use on this box."""
    manifest = json.loads((tiny_package / MANIFEST_NAME).read_text())
    package = tmp_path / "state" / "packages" / str(manifest["name"]) / str(manifest["version"])
    shutil.copytree(tiny_package, package)
    (tmp_path / "state" / "current").symlink_to(f"packages/{manifest['name']}/{manifest['version']}")
    return package


def config_for(tmp_path: Path, **sections: object) -> AgentConfig:
    base = {
        "state_dir": tmp_path / "state",
        "mqtt": MqttConfig(enabled=False),
        "local_api": LocalApiConfig(socket=None),
    }
    return AgentConfig(**{**base, **sections})  # type: ignore[arg-type]


def examined(config: AgentConfig, *checks: str) -> list[Finding]:
    made = ["package" if check == "memory" else check for check in checks]  # one check has findings of both names
    return [finding for finding in Doctor(config).examine(*made) if finding.check in checks]


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


@pytest.mark.parametrize(
    ("target", "words", "advice"),
    [
        ({"execution_provider": "cuda"}, "is built for cuda, this device has cpu", "build the package with -e"),
        ({"cpu_features": ["amx_of_tomorrow"]}, "needs a processor with amx_of_tomorrow", "push a package that"),
        ({"architectures": ["riscv64"]}, "runs on riscv64, this device is", "push a package that is built"),
        ({"min_onnxruntime": "99.0"}, "needs onnxruntime 99.0 or later", "push a package that is built"),
    ],
)
def test_a_package_for_another_box(
    tmp_path: Path, stored: Path, target: dict[str, object], words: str, advice: str
) -> None:
    manifest = json.loads((stored / MANIFEST_NAME).read_text())
    manifest["target"] |= target
    (stored / MANIFEST_NAME).write_text(json.dumps(manifest))
    *_, finding = examined(config_for(tmp_path), "package", "memory")
    assert (finding.check, finding.level) == ("package", "error")
    assert words in finding.message
    assert finding.advice is not None
    assert finding.advice.startswith(advice)


def test_a_package_that_fits_and_one_that_memory_does_not_hold(tmp_path: Path, stored: Path) -> None:
    found = examined(config_for(tmp_path), "package", "memory")
    assert [(finding.check, finding.level) for finding in found] == [("package", "ok"), ("memory", "ok")]
    found = examined(config_for(tmp_path, engine=EngineConfig(memory_budget_mb=1)), "memory")
    assert [finding.level for finding in found] == ["error"]
    assert "but the budget is 1048576" in found[0].message
    assert found[0].advice == "raise the memory budget, lower max_context_tokens, or use a smaller package"


def test_a_disk_that_is_nearly_full(tmp_path: Path) -> None:
    repository = RepositoryConfig(disk_reserve_mb=1 << 40)
    finding = examined(config_for(tmp_path, repository=repository), "disk")[0]
    assert (finding.level, finding.advice) == ("error", "free some, or add a disk")


def test_a_clock_that_stands_at_its_beginning(tmp_path: Path) -> None:
    doctor = Doctor(config_for(tmp_path), now=lambda: datetime(1970, 1, 1, tzinfo=UTC))
    (finding,) = doctor.examine("clock")
    assert (finding.level, finding.message) == ("error", "it is 1970-01-01 here")
    assert finding.advice is not None
    assert finding.advice.startswith("set the clock")


def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    mqtt = MqttConfig(enabled=False, tls=TlsConfig(ca_file=authority.path))
    doctor = Doctor(config_for(tmp_path, mqtt=mqtt), now=lambda: datetime.now(UTC) + timedelta(days=3))
    (finding,) = doctor.examine("certificates")
    assert (finding.level, finding.advice) == ("error", "replace it and restart the agent")
    assert finding.message == f"{authority.path} expired on {valid_until(authority.path):%Y-%m-%d}"


def test_a_local_api_that_cannot_be(tmp_path: Path) -> None:
    def finding_for(**api: Any) -> Finding:  # noqa: ANN401
        (finding,) = examined(config_for(tmp_path, local_api=LocalApiConfig(**api)), "local api")
        return finding

    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        path = Path(folder) / "a.sock"
        assert finding_for(socket=path).level == "ok"
        assert "there is no group 'nobody-knows-it'" in finding_for(socket=path, group="nobody-knows-it").message
        assert "the kernel takes 107" in finding_for(socket=path.with_name("x" * 120)).message
        assert "needs local_api.token_file" in finding_for(socket=None, tcp_port=free_port()).message
        path.write_text("precious")
        finding = finding_for(socket=path)
    assert (finding.level, finding.advice) == ("error", "remove it, or set local_api.socket")


def test_a_folder_for_the_socket_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamplighter_agent.service.doctor.os.access", lambda *_: False)  # root may write everywhere
    with tempfile.TemporaryDirectory(prefix="ll-") as folder:
        socket = Path(folder) / "missing" / "a.sock"
        (finding,) = examined(config_for(tmp_path, local_api=LocalApiConfig(socket=socket)), "local api")
    assert finding.level == "error"
    assert finding.message.endswith(f"may not write {folder}")


@pytest.mark.broker
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_a_broker_that_refuses_the_password_and_what_a_machine_is_told(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wrong")
    (tmp_path / "password").chmod(0o600)
    settings = {"mqtt.username": "box1", "mqtt.password_file": tmp_path / "password", "state_dir": tmp_path / "state"}
    with running_broker(tmp_path, "listener PORT 127.0.0.1\nallow_anonymous false\n") as broker:
        settings |= {"mqtt.port": broker.port, "local_api.socket": "null"}
        given = [f"--set={name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "lamplighter_agent", "doctor", "--json", *given]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 9
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert found["broker"]["level"] == "error"
    assert found["broker"]["message"].endswith("the broker refused the connection: Not authorized")
    assert found["broker"]["advice"].startswith("check mqtt.username and the password")


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("[Errno 111] Connection refused", "is the broker running"),
        ("[Errno -2] Name or service not known", "check mqtt.host"),
        ("[Errno -3] Temporary failure in name resolution", "check mqtt.host"),
        ("timed out", "check mqtt.host and mqtt.port, the route"),
        ("the broker refused the connection: Not authorized", "check mqtt.username and the password"),
        ("the broker refused the connection: Bad user name or password", "check mqtt.username and the password"),
        (
            "certificate verify failed: IP address mismatch, certificate is not valid for '127.0.0.1'.",
            "set mqtt.host to",
        ),
        ("certificate verify failed: Hostname mismatch, certificate is not valid for 'x'.", "set mqtt.host to"),
        ("certificate verify failed: unable to get local issuer certificate", "mqtt.tls.ca_file must be"),
        ("certificate verify failed: self-signed certificate in certificate chain", "mqtt.tls.ca_file must be"),
        ("certificate verify failed: certificate has expired", "renew the broker's certificate"),
        ("certificate verify failed: certificate is not yet valid", "set this box's clock"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "this port does not speak TLS"),
        ("it closed the connection without an answer: is this port for TLS", "a port for TLS needs mqtt.tls"),
        ("something new", "check mqtt.host, port, username, tls, and the broker's log"),
    ],
)
def test_each_fault_of_a_connection_has_its_advice(fault: str, advice: str) -> None:
    assert advice_for(fault).startswith(advice)
