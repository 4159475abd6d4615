"""What an update has the box prepare."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from lamplighter_agent.engine.prepare import PREPARED_NAME, PreparedRecord
from lamplighter_agent.package.manifest import read_manifest
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.update_hooks import ServiceHooks
from lamplighter_agent.service.updates import PREPARE_MODULE
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.store import Store


class NoLimits:
    """The unit's memory limits where there is no unit."""

    async def begin_share(self) -> None:
        """Nothing to change."""

    def let_go(self) -> None:
        """Nothing to change back."""


def prepare(package: Path, root: Path, module: str, *, prompt_weights: bool = False) -> None:
    """Prepare a package for this machine, as an update does."""

    async def call() -> None:
        hooks = ServiceHooks(
            cast(Store, SimpleNamespace(prepared_dir=root)),
            cast(PackageRunner, SimpleNamespace(limits=NoLimits())),
            prepare_module=module,
            prepare_timeout_s=120.0,
            prompt_weights=prompt_weights,
        )
        await asyncio.to_thread(hooks.prepare, package, read_manifest(package), Interrupt())

    asyncio.run(call())


@pytest.mark.parametrize("prompt_weights", [False, True])
def test_weights_for_prompts_are_prepared_where_they_are_configured(
    tiny_package: Path, tmp_path: Path, prompt_weights: bool
) -> None:
    prepare(tiny_package, tmp_path, PREPARE_MODULE, prompt_weights=prompt_weights)
    (copy,) = tmp_path.iterdir()
    record = msgspec.json.decode((copy / PREPARED_NAME).read_bytes(), type=PreparedRecord)
    assert record.prompts is prompt_weights


def test_the_kernel_would_end_what_prepares_before_the_agent(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wait_for_score.py").write_text(
        "import pathlib, time\n"
        "score, end = pathlib.Path('/proc/self/oom_score_adj'), time.monotonic() + 60\n"
        "while (found := score.read_text().strip()) != '500' and time.monotonic() < end:\n"
        "    time.sleep(0.001)\n"
        "raise SystemExit(0 if found == '500' else found)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prepare(tiny_package, tmp_path / "prepared", "wait_for_score")
