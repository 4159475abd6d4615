"""The configuration file: strict, with errors that name line and nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.config_file import load_config
from lamplighter_agent.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_example_shows_the_defaults() -> None:
    assert load_config(ROOT / "configs" / "agent.yaml") == AgentConfig()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == AgentConfig()


def test_a_section_whose_lines_are_commented_out_gives_its_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "mqtt:\n  # host: x\n")) == AgentConfig()


def test_values_are_read_with_their_types(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "device: {id: box1, groups: [a, b]}\nstate_dir: /srv/x\nmqtt: {tls: {ca_file: ca.pem}}\n")
    )
    assert config.device.id == "box1"
    assert config.device.groups == ("a", "b")
    assert config.state_dir == Path("/srv/x")
    assert config.mqtt.tls is not None
    assert config.mqtt.tls.ca_file == Path("ca.pem")


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "mqtt:\n  port: 1\n"), ["mqtt.port=2", "local_api.socket=null"])
    assert config.mqtt.port == 2
    assert config.local_api.socket is None


def test_an_unknown_key_names_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, "device:\n  id: box1\nmqtt:\n  hots: broker\n")
    with pytest.raises(ConfigError, match=r"agent\.yaml:4: unknown key 'mqtt\.hots'") as caught:
        load_config(path)
    assert caught.value.hint == "did you mean 'mqtt.host'?"
    assert caught.value.exit_code == 3


def test_an_unknown_key_without_a_near_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "zzz: 1\n"))
    assert caught.value.hint is not None
    assert "mqtt" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("mqtt:\n  port: 70000\n", r"agent\.yaml:2: mqtt\.port: Expected `int` <= 65535"),
        ("mqtt:\n\n  port: '1883'\n", r"agent\.yaml:3: mqtt\.port: Expected `int`, got `str`"),
        ("mqtt: 5\n", r"agent\.yaml:1: mqtt: Expected `object`"),
        ("state_dir: 3\n", r"agent\.yaml:1: state_dir: Expected a path"),
        ("device:\n  id: a/b\n", r"agent\.yaml:2: device\.id"),
        ("device:\n  groups: [ok, 'not ok']\n", r"agent\.yaml:2: device\.groups"),
        ("log: {level: loud}\n", r"agent\.yaml:1: log\.level"),
        ("mqtt:\n  port: 1\n  port: 2\n", r"agent\.yaml:3: mqtt\.port is given twice"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "not valid YAML"),
        ("? [a]\n: b\n", "plain word|not valid YAML"),
    ],
)
def test_a_wrong_value_names_its_line(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["mqtt.port", "=1", "mqtt.port=[", "state_dir.x=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, "state_dir: /x\n"), [override])
