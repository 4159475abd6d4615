"""Chat formats that a user writes by hand, as the builder's README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamplighter_agent.cli import main as agent_main
from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.package.manifest import read_manifest
from lamplighter_builder.cli import main
from lamplighter_builder.sources import read_chat_format
from support.tiny_model import write_tiny_checkpoint

README = Path(__file__).parents[2] / "builder/README.md"
(EXAMPLE,) = re.findall(r"<!-- chat format -->\n```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_takes_the_place_of_a_template_that_cannot_be_compiled(tmp_path: Path) -> None:
    template = "{{ messages[-1].content | upper }}"
    checkpoint = write_tiny_checkpoint(tmp_path / "model", chat_template=template)
    arguments = ["build", "-m", str(checkpoint), "-o", str(tmp_path / "package"), "-p", "int4", "--no-fidelity"]
    assert main(arguments) == 10
    (tmp_path / "format.json").write_text(EXAMPLE)
    assert main([*arguments, "--chat-format", str(tmp_path / "format.json")]) == 0
    found = read_manifest(tmp_path / "package").chat_format
    assert found is not None
    rendered = "".join(segment.text for segment in found.render([ChatMessage("user", "Hi \n")]))
    system = "<|im_start|>system\nYou answer in one sentence.<|im_end|>\n"
    assert rendered == f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"default_system"', '"system_default"', "no chat format has 'system_default'"),
        ('"strip_end"', '"strip"', "roles: user: no chat format has 'strip'"),
        ('"alternating"', '"strict"', "no chat format: Invalid enum value 'strict'"),
        ('"generation_prompt"', '"prompt"', "Object missing required field `generation_prompt`"),
    ],
)
def test_slips_are_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in EXAMPLE
    (tmp_path / "format.json").write_text(EXAMPLE.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        read_chat_format(tmp_path / "format.json")


def test_a_package_without_a_chat_format_is_told_of_and_does_not_open_a_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    (checkpoint / "chat_template.jinja").unlink()
    arguments = ["build", "-m", str(checkpoint), "-o", str(tmp_path / "package"), "-p", "int4", "--no-fidelity"]
    assert main(arguments) == 0
    assert "there is no chat template: the package continues texts" in capsys.readouterr().err
    assert agent_main(["generate", str(tmp_path / "package")]) == 8
    said = capsys.readouterr()
    assert "has no chat format, so it cannot chat" in said.err
    assert said.out == ""
