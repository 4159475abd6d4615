from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.package.chat_format import ChatFormat, RoleFormat
from lamplighter_agent.package.manifest import decode_manifest
from lamplighter_builder.cli import main
from lamplighter_builder.terminal_progress import TerminalProgress
from support.tiny_model import TinyShape, write_tiny_checkpoint

RAW = ChatFormat(begin="", roles={"user": RoleFormat(prefix="U: ", suffix="\n")}, generation_prompt="A: ")


def test_build_and_inspect(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = str(tmp_path / "package")
    assert main(["build", "-m", str(tiny_checkpoint), "-o", package, "-p", "int4", "-e", "cpu", "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["package"] == "tiny-llama-int4/1.0.0"
    assert "weights: 100%" in found.err
    assert main(["inspect", package, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["operators"]["GroupQueryAttention"] == 2
    assert main(["inspect", package]) == 0
    assert "licence: Apache-2.0" in capsys.readouterr().out


def test_names_licence_and_chat_format_can_be_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "format.json").write_bytes(msgspec.json.encode(RAW))
    options = ["--name", "box", "--version", "2.1", "--licence", "MIT", "--chat-format", str(tmp_path / "format.json")]
    assert main(["build", "-m", str(tiny_checkpoint), "-o", str(tmp_path / "p"), "-p", "fp32", *options]) == 0
    manifest = decode_manifest((tmp_path / "p" / "manifest.json").read_bytes())
    assert (manifest.reference, manifest.licence, manifest.chat_format) == ("box/2.1", "MIT", RAW)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "{tmp}/no/such/model", "-p", "int4"], 3, "no such file or directory"),
        (["-m", "{tmp}", "-p", "int4"], 10, "config.json: no such file"),
        (["-m", "{model}", "-p", "int4", "--name", "../escape"], 3, "package name"),
        (["-m", "{model}", "-p", "int4", "--chat-format", "{tmp}/none.json"], 3, "no chat format"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    filled = [text.format(tmp=tmp_path, model=tiny_checkpoint) for text in arguments]
    assert main(["build", *filled, "-o", str(tmp_path / "package")]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_error_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "file_missing"


def test_hub_id_without_a_network_is_a_checkpoint_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hub client reads this at import; the endpoint is a closed port of the loopback either way.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["build", "-m", "owner/model", "-o", str(tmp_path / "p"), "-p", "int4", "-c", str(tmp_path / "cache")]
    assert main(arguments) == 10
    assert "owner/model" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_evaluate(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, text = tmp_path / "package", tmp_path / "text.txt"
    text.write_text("The lamps along the harbour. " * 8)
    assert main(["build", "-m", str(tiny_checkpoint), "-o", str(package), "-p", "fp32"]) == 0
    capsys.readouterr()
    arguments = ["evaluate", str(package), "--reference", str(tiny_checkpoint), "--text", str(text)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(package)]
    assert found["top1_agreement"] == 1.0
    assert found["kl_mean"] < 1e-6
    assert main(["evaluate", str(tmp_path), *arguments[2:]]) == 4  # no package
    for content in (b"\xff\xfe\xff", b""):
        text.write_bytes(content)
        assert main(arguments) == 3


def test_wrong_call_exits_with_two() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "-p", "int3"])
    assert caught.value.code == 2


def test_checkpoint_without_chat_template_builds_without_chat_format(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "base", TinyShape(num_hidden_layers=1))
    (checkpoint / "chat_template.jinja").unlink()
    assert main(["build", "-m", str(checkpoint), "-o", str(tmp_path / "p"), "-p", "int4"]) == 0
    assert decode_manifest((tmp_path / "p" / "manifest.json").read_bytes()).chat_format is None


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_and_a_file_gets_lines() -> None:
    for stream, mark in ((Terminal(), "\r"), (io.StringIO(), "\n")):
        progress = TerminalProgress(stream)
        progress.stage("weights", 10)
        progress.advance(10)
        progress.close()
        assert "100%" in stream.getvalue()
        assert mark in stream.getvalue()


def test_time_left_is_that_of_all_stages_to_come() -> None:
    stream, now = io.StringIO(), [100.0]
    progress = TerminalProgress(stream, clock=lambda: now[0])
    progress.expect({"weights": 30.0, "fidelity": 60.0, "hashing": 10.0})
    progress.stage("weights", 2)
    for _ in range(2):
        now[0] += 90.0
        progress.advance(1)
    progress.stage("fidelity", 4)
    now[0] += 60.0
    progress.advance(2)
    # 180 s for 30 parts. Then 60 s for half of a stage, so 60 for the rest; and four seconds a part for the last ten.
    lines = stream.getvalue().splitlines()
    assert lines[1:3] == ["weights: 50%, 8 min left", "weights: 100%, 3 min, 7 min left"]
    assert lines[-1] == "fidelity: 50%, 2 min left"


def test_time_left_is_that_of_the_stage_where_nothing_is_known_of_others() -> None:
    stream, now = io.StringIO(), [100.0]
    progress = TerminalProgress(stream, clock=lambda: now[0])
    progress.stage("weights", 4)
    now[0] += 20.0
    progress.advance(1)
    assert stream.getvalue().splitlines()[-1] == "weights: 25%, 60 s left"
