"""The runner: trials beside the package in use, switches that succeed or fail, restarts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lamplighter_agent.config import RequestsConfig
from lamplighter_agent.engine.memory import MIB
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import IncompatiblePackageError, RequestError, WorkerError
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.service import runner as runner_module
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.ticket import GenerationRequest
from lamplighter_agent.service.worker import WorkerSpec
from lamplighter_agent.service.worker_messages import Prompt
from support.cgroups import memory_group
from support.packages import write_package


def two_self_tests(tree: dict[str, Any]) -> None:
    tree["self_tests"] = [
        {"prompt_tokens": [1, 2], "expected_tokens": [3, 4, 5], "min_matching_tokens": 2},
        {"prompt_tokens": [5], "expected_tokens": [6, 7], "min_matching_tokens": 2},
    ]


class Bench:
    """A runner with its queue and the states it went through."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.queue = RequestQueue(RequestsConfig(max_tokens=1000))
        self.states: list[str] = []
        self.runner = PackageRunner(spec, self.queue, lambda: self.states.append(self.runner.state))

    async def ask(self, text: str = "hi") -> Answer:
        prompt = Prompt(text=text)
        ticket = self.queue.submit(GenerationRequest(id=text, sender="a", prompt=prompt, params=GenerationParams()))
        assert ticket is not None
        async for event in ticket:
            if isinstance(event, Answer):
                return event
        raise AssertionError("no answer")


def with_bench(spec: WorkerSpec, scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        bench = Bench(spec)
        try:
            await scenario(bench)
        finally:
            await bench.runner.stop(0.0)

    asyncio.run(run())


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, Path, Manifest]:
    """Two versions, and the manifest of the second."""
    write_package(tmp_path / "one", version="1.0.0", change=two_self_tests)
    return tmp_path / "one", tmp_path / "two", write_package(tmp_path / "two", version="2.0.0", change=two_self_tests)


def test_a_trial_runs_every_self_test_and_leaves_the_package_in_use(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest]
) -> None:
    one, two, manifest = packages

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        measurement = await bench.runner.measure(two, manifest)
        assert measurement.self_test_tokens == ((3, 4, 5), (6, 7))
        assert measurement.load_s >= 0
        assert measurement.peak_rss_bytes is not None
        assert (await bench.ask()).package == "tiny/1.0.0"
        assert bench.states == ["ready"]

    with_bench(spec, scenario)


def test_a_switch_lets_running_answers_finish_on_the_old_package(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest]
) -> None:
    one, two, manifest = packages

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        running = asyncio.create_task(bench.ask("/count 200"))
        while not bench.queue.active:  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0)
        await bench.runner.switch(two, manifest)
        assert (await bench.ask()).package == "tiny/2.0.0"
        assert (await running).package == "tiny/1.0.0"

    with_bench(spec, scenario)


@pytest.mark.parametrize("room", [True, False], ids=["memory for both", "memory for one"])
def test_a_switch_that_fails_leaves_or_brings_back_the_old_package(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest], monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    one, two, manifest = packages
    (two / "refuse-to-load").touch()
    monkeypatch.setattr(runner_module, "_fits", lambda _manifest, _options: room)

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        with pytest.raises(IncompatiblePackageError):
            await bench.runner.switch(two, manifest)
        assert (await bench.ask()).package == "tiny/1.0.0"
        assert ("switching" in bench.states) is not room

    with_bench(spec, scenario)


def test_where_memory_holds_one_package_the_trial_stops_the_other_for_its_time(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, manifest = packages
    monkeypatch.setattr(runner_module, "_fits", lambda _manifest, _options: False)

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        trial = asyncio.create_task(bench.runner.measure(two, manifest))
        while bench.runner.state != "switching":  # noqa: ASYNC110 (there is no event for it)
            await asyncio.sleep(0)
        waiting = asyncio.create_task(bench.ask())  # waits for the package to come back
        await trial
        assert (await waiting).package == "tiny/1.0.0"

    with_bench(spec, scenario)


def test_a_killed_worker_is_replaced(spec: WorkerSpec, packages: tuple[Path, Path, Manifest]) -> None:
    one, _, _ = packages

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        assert bench.runner.worker is not None
        assert bench.runner.worker.pid is not None
        os.kill(bench.runner.worker.pid, signal.SIGKILL)
        await bench.runner.worker.ended.wait()
        assert (await bench.ask()).package == "tiny/1.0.0"
        assert (bench.runner.restarts, bench.states) == (1, ["ready", "restarting", "ready"])
        assert bench.runner.last_end is not None
        assert "killed by SIGKILL" in bench.runner.last_end

    with_bench(spec, scenario)


def test_a_package_that_cannot_start_is_refused_with_the_reason(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest]
) -> None:
    one, _, _ = packages
    (one / "refuse-to-load").touch()

    async def scenario(bench: Bench) -> None:
        bench.runner.start(one)
        await bench.runner.wait_settled()
        assert bench.runner.state == "failed"
        with pytest.raises(RequestError, match="cannot be started: the fake engine cannot load") as caught:
            await bench.ask()
        assert caught.value.code == 503

    with_bench(spec, scenario)


def test_a_worker_that_the_kernel_ends_for_memory_comes_back_by_itself(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest]
) -> None:
    one, _, _ = packages

    async def scenario(bench: Bench) -> None:
        await bench.runner.switch(one)
        with memory_group(32 * MIB) as group:
            worker = bench.runner.worker
            assert worker is not None
            assert worker.pid is not None
            group.add(worker.pid)
            with pytest.raises(WorkerError, match=r"killed by SIGKILL \(out of memory\?\)") as caught:
                await bench.ask("/eat 256")
            assert (caught.value.hint, group.kills) == ("send the request again", 1)
        assert (await bench.ask("hello")).text == "You said: hello"
        assert bench.runner.restarts == 1

    with_bench(spec, scenario)


def test_restart_brings_a_new_worker_for_the_same_package(
    spec: WorkerSpec, packages: tuple[Path, Path, Manifest]
) -> None:
    one, _, _ = packages

    async def scenario(bench: Bench) -> None:
        with pytest.raises(RequestError, match="no package"):
            await bench.runner.restart()
        await bench.runner.switch(one)
        before = bench.runner.worker
        await bench.runner.restart()
        assert (await bench.ask()).package == "tiny/1.0.0"
        assert bench.runner.worker is not before

    with_bench(spec, scenario)
