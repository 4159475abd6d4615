"""What is desired comes in any order, more than once, with restarts in between: the last wish wins, once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamplighter_agent.errors import TrialFailedError
from lamplighter_agent.update.states import Desired, UpdateState
from lamplighter_fleet.keys import KeyDirectory
from support.crash_lab import copy_state
from support.package_server import PackageServer
from support.update_world import World, make_world

WISHES = [
    Desired(package="tiny", version=version, id=name)
    for name, version in (("a", "1.0.0"), ("b", "2.0.0"), ("c", "3.0.0"), ("bad", "9.9.9"), ("d", "1.0.0"))
]
RESTART = "restart"


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory, keys: KeyDirectory) -> Path:
    """A repository with three versions, and a device that holds all of them."""
    folder = tmp_path_factory.mktemp("order")
    with make_world(folder, keys) as world:
        for number in (1, 2, 3):
            world.publish(f"{number}.0.0", weights_seed=number)
        world.updater().packages()
    return folder


@pytest.fixture(scope="module")
def server(beginning: Path) -> Iterator[PackageServer]:
    with PackageServer(beginning / "repository") as made:
        yield made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.lists(st.sampled_from([*WISHES, RESTART]), min_size=1, max_size=7))
def test_repeated_reordered_and_replayed_wishes_are_harmless(
    beginning: Path, server: PackageServer, keys: KeyDirectory, order: list[Desired | str]
) -> None:
    """A new wish counts. Told again it changes nothing, nor does one that was followed by another."""
    with tempfile.TemporaryDirectory() as folder:
        copy_state(beginning / "state", Path(folder) / "state")
        world = World(Path(folder), keys, server)
        updater = world.updater()
        seen: list[Desired] = []
        expected: str | None = None
        tried = 0
        for step in order:
            if isinstance(step, str):
                updater = world.updater()
                updater.resume()
                continue
            report = updater.apply(step).report
            assert report.state.is_final
            if step not in seen:
                seen.append(step)
                if step.id != "bad":
                    tried += str(step) != expected
                    expected = str(step)
                    assert report.state is UpdateState.ACTIVE
            # Whatever was asked, the answer is about the newest wish.
            assert report.id == seen[-1].id
            assert report.active == expected == world.current()
        assert len(world.service.tried) == tried
        assert len(world.service.activated) == tried


def test_wish_that_failed_is_not_tried_again_by_its_replay(beginning: Path, tmp_path: Path, keys: KeyDirectory) -> None:
    copy_state(beginning, tmp_path / "world")
    with PackageServer(tmp_path / "world" / "repository") as server:
        world = World(tmp_path / "world", keys, server)
        world.updater().apply(WISHES[0])
        world.service.trial_error = TrialFailedError("bad")
        failed = world.updater().apply(WISHES[1]).report
        world.service.trial_error = None
        again = world.updater().apply(WISHES[1]).report
        old = world.updater().apply(WISHES[0]).report
    assert (failed.state, again.state, again.message) == (UpdateState.FAILED, UpdateState.FAILED, failed.message)
    assert (old.id, old.state, old.active) == ("b", UpdateState.FAILED, "tiny/1.0.0")
    assert len(world.service.tried) == 2
