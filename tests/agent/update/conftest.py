from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lamplighter_fleet.keys import KeyDirectory, create_keys
from support.update_world import World, make_world


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyDirectory:
    directory = tmp_path_factory.mktemp("keys")
    create_keys(directory)
    return KeyDirectory(directory)


@pytest.fixture
def world(tmp_path: Path, keys: KeyDirectory) -> Iterator[World]:
    with make_world(tmp_path, keys) as made:
        yield made
