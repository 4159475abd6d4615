"""Fixtures of the service's tests: real worker processes with the fake engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.service.worker import WorkerSpec
from support import fake_engine

TESTS = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _engine_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def fake_package(tmp_path: Path) -> Path:
    """A package directory for the fake engine, which answers as ``fake/1``."""
    package = tmp_path / "fake"
    package.mkdir()
    return package


@pytest.fixture
def spec(fake_package: Path) -> WorkerSpec:
    """A worker with the fake engine and two slots."""
    return WorkerSpec(
        package=fake_package,
        engine=fake_engine.ENTRY,
        start_timeout_s=20.0,
        stall_timeout_s=30.0,
        options=EngineOptions(slots=2),
    )
