"""The agent's commands on a real package: what they print and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lamplighter_agent.cli import main, make_parser
from lamplighter_agent.engine.generation_arguments import generation_params
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import ConfigError

CLI = [sys.executable, "-m", "lamplighter_agent"]


def test_generate_prints_text_and_json_says_the_same(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(tiny_package), "hello", "--max-tokens", "6", "--temperature", "0"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == text.removesuffix("\n")
    assert answer["package"] == "tiny/1.0.0"
    assert answer["usage"]["generated_tokens"] <= 6


def test_without_a_prompt_it_chats_until_the_input_ends(tiny_package: Path) -> None:
    chat = subprocess.run(
        [*CLI, "generate", str(tiny_package), "--max-tokens", "4", "--temperature", "0"],
        input="hello\n\n/reset\nhello\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    answers = chat.stdout.split("> ")
    assert answers[1] == answers[4]  # prompts: hello, an empty line, /reset, hello again, end of input


def test_verify_lists_every_file(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_package)]) == 0
    output = capsys.readouterr().out
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        assert name in output


def test_verify_names_the_changed_file_and_fails_as_a_package_error(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(tiny_package, package)
    with (package / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\xff\xff")
    assert main(["verify", str(package), "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["reason"] == "hash_mismatch"
    assert "model.onnx.data" in captured.err


def test_bench_gives_every_figure_and_the_ratio_to_the_bare_loop(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--runs", "1", "--prompt-tokens", "16", "--generated-tokens", "8"]
    assert main(["bench", str(tiny_package), *sizes, "--prepared", str(tmp_path / "prepared"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["prepared"] is True
    for name in ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s", "peak_rss_bytes", "decode_ratio"):
        assert figures[name] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "/nowhere", "hi"], 4, "/nowhere"),
        (["run", "--config", "/nowhere.yaml"], 3, "/nowhere.yaml"),
        (["run", "--set", "mqtt.hots=x"], 3, "did you mean 'mqtt.host'?"),
        (["status", "--socket", "/nowhere.sock"], 9, "no agent listens on /nowhere.sock"),
        (["status", "--set", "local_api.socket=null"], 3, "--socket"),
        (["pull", "a/1", "--from", "/nowhere"], 3, "root_file"),
    ],
)
def test_errors_say_what_to_do_and_tell_their_family(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert words in capsys.readouterr().err


def test_an_option_out_of_range_is_named(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_package), "hi", "--top-p", "1.5"]) == 8
    assert "top_p" in capsys.readouterr().err


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "Manifest" in json.loads(capsys.readouterr().out)["$defs"]


def test_config_shows_every_setting_and_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "device.id=box7", "--set", "mqtt.password_file=mqtt.password"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(shown)
    assert main(["config", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == shown
    assert "password_file: mqtt.password" in shown


def test_config_names_the_wrong_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "mqtt.prot=1"]) == 3
    assert "mqtt.prot" in capsys.readouterr().err


def test_every_option_of_a_request_is_a_flag_of_generate() -> None:
    arguments = make_parser().parse_args(["generate", "package", "--no-speculation", "--early-stopping", "never"])
    assert set(GenerationParams.__struct_fields__) - {"deadline_s"} <= set(vars(arguments))
    assert (arguments.speculation, arguments.early_stopping) == (False, "never")


def test_flags_become_the_options_of_the_request(tmp_path: Path) -> None:
    grammar = tmp_path / "lamp.lark"
    grammar.write_text('start: "lamp"', encoding="utf-8")
    flags = ["--logit-bias", "7=-2.5", "--stop", "a", "--stop", "b", "--guided-grammar", f"@{grammar}"]
    params = generation_params(make_parser().parse_args(["generate", "package", *flags]))
    assert params == GenerationParams(logit_bias={7: -2.5}, stop=("a", "b"), guided_grammar='start: "lamp"')
    with pytest.raises(ConfigError, match="must be ID=BIAS"):
        generation_params(make_parser().parse_args(["generate", "package", "--logit-bias", "seven"]))
    with pytest.raises(ConfigError, match="cannot be read"):
        generation_params(make_parser().parse_args(["generate", "package", "--guided-json", "@missing"]))
