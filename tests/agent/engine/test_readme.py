"""The examples of the library chapter, run in order as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lamplighter_agent.engine.live import LiveSequence

README = Path(__file__).parents[3] / "agent/README.md"
EXAMPLES = re.findall(r"<!-- example -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run_on_any_package(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").symlink_to(tiny_package)
    assert len(EXAMPLES) == 6
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, str(README), "exec"), names)
    texts, answer, live = names["texts"], names["answer"], names["live"]
    assert isinstance(texts, dict)
    assert sorted(texts) == [0, 1, 2]
    assert isinstance(answer, str)
    assert not re.search("[0-9]", answer)
    assert isinstance(live, LiveSequence)
    assert "length" in capsys.readouterr().out
