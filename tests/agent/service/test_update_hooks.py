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


@pytest.mark.parametrize("prompt_weights", [False, True])
def test_weights_for_prompts_are_prepared_where_they_are_configured(
    tiny_package: Path, tmp_path: Path, prompt_weights: bool
) -> None:
    async def prepare() -> None:
        hooks = ServiceHooks(
            cast(Store, SimpleNamespace(prepared_dir=tmp_path)),
            cast(PackageRunner, SimpleNamespace(limits=NoLimits())),
            prepare_module=PREPARE_MODULE,
            prepare_timeout_s=120.0,
            prompt_weights=prompt_weights,
        )
        await asyncio.to_thread(hooks.prepare, tiny_package, read_manifest(tiny_package), Interrupt())

    asyncio.run(prepare())
    (copy,) = tmp_path.iterdir()
    record = msgspec.json.decode((copy / PREPARED_NAME).read_bytes(), type=PreparedRecord)
    assert record.prompts is prompt_weights
