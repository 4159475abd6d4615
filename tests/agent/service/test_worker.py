"""The worker process and its client, with a small engine in a real child process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import psutil
import pytest

from lamplighter_agent.engine.events import Finished, TextDelta
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import (
    ContextOverflowError,
    EngineError,
    IncompatiblePackageError,
    RequestError,
    WorkerError,
)
from lamplighter_agent.service.worker import EngineWorker, WorkerSpec
from lamplighter_agent.service.worker_messages import Prompt
from support.workers import running


async def answer(worker: EngineWorker, text: str) -> tuple[str, Finished]:
    parts: list[str] = []
    async for event in worker.generate(f"request {text}", Prompt(text=text), GenerationParams()):
        if isinstance(event, Finished):
            return "".join(parts) + event.text_tail, event
        parts.append(event.text)
    raise AssertionError("the iterator ended without a final event")


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_answers_and_reports_usage(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            assert worker.ready is not None
            assert (worker.ready.package, worker.ready.slots) == ("fake/1", 2)
            text, final = await answer(worker, "hello")
        assert text == "You said: hello"
        assert final.finish_reason == "stop"
        assert final.usage.generated_tokens == len("You said: hello")

    asyncio.run(scenario())


def test_two_requests_are_answered_side_by_side(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            answers = await asyncio.gather(answer(worker, "/count 40"), answer(worker, "hello"))
        assert [text for text, _ in answers] == [" ".join(map(str, range(1, 41))), "You said: hello"]

    asyncio.run(scenario())


def test_cancel_ends_a_request_with_what_it_had(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            last: TextDelta | Finished | None = None
            async for event in worker.generate("r", Prompt(text="/slow"), GenerationParams()):
                worker.cancel("r")
                last = event
            assert isinstance(last, Finished)
            assert last.finish_reason == "cancelled"
            assert (await answer(worker, "again"))[0] == "You said: again"

    asyncio.run(scenario())


def test_leaving_the_iterator_cancels_the_request(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(
            msgspec.structs.replace(spec, options=msgspec.structs.replace(spec.options, slots=1))
        ) as worker:
            events = worker.generate("r", Prompt(text="/slow"), GenerationParams())
            await anext(events)
            await events.aclose()
            assert worker.active == 0
            # The only slot is free again, or this would wait behind an endless answer.
            text, _ = await asyncio.wait_for(answer(worker, "next"), 5)
        assert text == "You said: next"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("/refuse", RequestError),
        ("x" * 5000, ContextOverflowError),
        ("/fail", EngineError),
        ("/defect", EngineError),
    ],
    ids=["refused", "too long", "engine failure", "defect"],
)
def test_an_error_of_the_engine_keeps_its_class_and_spares_the_worker(
    spec: WorkerSpec, prompt: str, error: type[Exception]
) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            with pytest.raises(error) as caught:
                await answer(worker, prompt)
            assert type(caught.value) is error
            assert (await answer(worker, "hello"))[0] == "You said: hello"

    asyncio.run(scenario())


def test_a_killed_worker_fails_its_requests_with_a_retryable_error(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(spec)
        await worker.start()
        with pytest.raises(WorkerError, match="killed by SIGKILL"):
            await answer(worker, "/crash")
        await asyncio.wait_for(worker.ended.wait(), 5)
        assert worker.state == "ended"
        with pytest.raises(WorkerError, match="not ready"):
            await answer(worker, "hello")
        await worker.stop()

    asyncio.run(scenario())


def test_a_stopped_worker_is_found_and_killed(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(msgspec.structs.replace(spec, stall_timeout_s=0.5))
        await worker.start()
        with pytest.raises(WorkerError, match="no sign of life"):
            await answer(worker, "/stop")
        await worker.stop()

    asyncio.run(scenario())


def test_a_worker_that_is_stopped_while_nobody_asks_is_found_and_killed(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(msgspec.structs.replace(spec, stall_timeout_s=0.5))
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        await asyncio.wait_for(worker.ended.wait(), 10)
        assert worker.end_reason.startswith("it gave no sign of life for 0.5 s")
        await worker.stop()

    asyncio.run(scenario())


def test_the_kernel_would_end_the_worker_before_the_agent(spec: WorkerSpec) -> None:
    async def scenario() -> int | None:
        async with running(spec) as worker:
            return worker.pid and int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text())  # noqa: ASYNC240

    assert asyncio.run(scenario()) == 500


def test_a_worker_that_is_stopped_with_a_full_channel_is_found_and_killed(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(msgspec.structs.replace(spec, stall_timeout_s=0.5))
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="no sign of life"):
            await asyncio.wait_for(answer(worker, "x" * 4_000_000), 10)
        await worker.stop()

    asyncio.run(scenario())


def test_a_number_that_no_frame_holds_is_the_requests_fault(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            with pytest.raises(RequestError, match="more than 64 bits") as caught:
                await worker.detokenize((2**64,))
            assert caught.value.code == 400
            assert (worker.silent_s, worker.active) == (0.0, 0)

    asyncio.run(scenario())


def test_a_worker_without_work_gives_signs_of_life_and_lives(spec: WorkerSpec) -> None:
    async def scenario() -> float:
        async with running(msgspec.structs.replace(spec, stall_timeout_s=1.0)) as worker:
            await asyncio.sleep(1.6)  # longer than it may be silent
            assert (await answer(worker, "hello"))[0] == "You said: hello"
            return worker.silent_s

    assert asyncio.run(scenario()) < 1.0


def test_a_package_that_cannot_be_loaded_says_why(spec: WorkerSpec, fake_package: Path) -> None:
    (fake_package / "refuse-to-load").touch()

    async def scenario() -> None:
        worker = EngineWorker(spec)
        with pytest.raises(IncompatiblePackageError, match="cannot load") as caught:
            await worker.start()
        assert caught.value.hint == "use another"
        assert worker.state == "ended"

    asyncio.run(scenario())


def test_a_worker_that_dies_while_loading_is_reported(spec: WorkerSpec, fake_package: Path) -> None:
    (fake_package / "crash-at-load").touch()

    async def scenario() -> None:
        with pytest.raises(WorkerError, match=r"while it loaded .* killed by SIGKILL"):
            await EngineWorker(spec).start()

    asyncio.run(scenario())


def test_a_worker_that_is_not_ready_in_time_is_killed(spec: WorkerSpec, fake_package: Path) -> None:
    (fake_package / "hang-at-load").touch()

    async def scenario() -> None:
        worker = EngineWorker(msgspec.structs.replace(spec, start_timeout_s=1.5))
        with pytest.raises(WorkerError, match=r"not ready within 1\.5 s"):
            await worker.start()
        assert worker.pid is None

    asyncio.run(scenario())


def test_stop_lets_a_running_request_finish(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(spec)
        await worker.start()
        events = worker.generate("r", Prompt(text="/count 30"), GenerationParams())
        first = await anext(events)
        stopping = asyncio.create_task(worker.stop(grace_s=10))
        parts = [first.text if isinstance(first, TextDelta) else ""]
        parts += [event.text async for event in events if isinstance(event, TextDelta)]
        await stopping
        assert "".join(parts) == " ".join(map(str, range(1, 31)))
        assert worker.state == "ended"

    asyncio.run(scenario())


def test_sigterm_ends_the_worker_cleanly(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(spec)
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        await asyncio.wait_for(worker.ended.wait(), 5)
        with pytest.raises(WorkerError, match="exit status 0"):
            await answer(worker, "hello")
        await worker.stop()

    asyncio.run(scenario())


def test_the_worker_ends_when_its_parent_is_killed(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        worker = EngineWorker(spec)
        await worker.start()
        assert worker.pid is not None
        pid = worker.pid
        assert worker._writer is not None  # what the kernel does to the socket of a killed parent
        worker._writer.transport.abort()
        await asyncio.wait_for(worker.ended.wait(), 5)
        assert gone(pid)
        await worker.stop()

    asyncio.run(scenario())


def test_tokenize_and_stats(spec: WorkerSpec) -> None:
    async def scenario() -> None:
        async with running(spec) as worker:
            assert await worker.tokenize(Prompt(text="abc")) == (97, 98, 99)
            stats = await worker.stats()
            assert 1_000_000 < stats.rss_bytes <= stats.peak_rss_bytes

    asyncio.run(scenario())
