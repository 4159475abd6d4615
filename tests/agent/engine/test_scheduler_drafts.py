"""Speculation and the pace of chunks as the scheduler does them, on a model without weights."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamplighter_agent.engine.events import Event, Failed, Finished, TextDelta
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.scheduler import Scheduler
from support.toy_engine import DEFAULTS, VOCAB_SIZE, ChecksumRunner, byte_level_tokenizer, memory_plan

TOKENIZER = byte_level_tokenizer()
GREEDY = GenerationParams(max_tokens=6, temperature=0.0)
SEEDED = GenerationParams(max_tokens=6, temperature=1.0, seed=5)


class World:
    """A scheduler on a toy runner, with a clock that chunks move on and all events in one list."""

    def __init__(self, runner: ChecksumRunner, plan: MemoryPlan) -> None:
        self.now = 100.0
        self.runner = runner
        runner.on_prefill = self.pass_time
        self.scheduler = Scheduler(
            runner,
            Intake(TOKENIZER, defaults=DEFAULTS, plan=plan, vocab_size=VOCAB_SIZE),
            plan=plan,
            max_queued_requests=64,
            clock=lambda: self.now,
        )
        self.events: list[Event] = []

    def submit(self, request_id: str, prompt: list[int], params: GenerationParams = GREEDY) -> None:
        self.scheduler.submit(request_id, prompt, params)

    def step(self) -> None:
        self.events += self.scheduler.step()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def drain(self) -> None:
        self.drain_until(lambda: self.scheduler.idle)

    def drain_until(self, reached: Callable[[], bool]) -> None:
        for _ in range(2000):
            if reached():
                return
            self.step()
        raise AssertionError("the scheduler does not get there")

    def tokens(self, request_id: str) -> list[int]:
        deltas = [event for event in self.events if isinstance(event, TextDelta) and event.request_id == request_id]
        return [token for delta in deltas for token in delta.token_ids]

    def finished(self, request_id: str) -> Finished:
        ends = [event for event in self.events if isinstance(event, Finished) and event.request_id == request_id]
        (end,) = ends
        return end


REPETITIVE = [11, 12, 13, 14, 15, 16, 17, 18] * 4


class CopyingRunner(ChecksumRunner):
    """A checksum model that mostly continues its text as it went on eight tokens before."""

    def _logits(self, slot: int) -> NDArray[np.float32]:
        logits = super()._logits(slot)
        tokens = self.cache.buffers[0][slot, 0, : self.cache.offset(slot), 0]
        if len(tokens) >= 8 and int(tokens[-1]) % 5:
            logits[int(tokens[-8])] += 9.5
        return logits


def copying_world(*, inexact: tuple[int, ...] = (), slots: int = 4, kv_tokens: int | None = None) -> World:
    plan = memory_plan(slots=slots, context=256, kv_tokens=kv_tokens)
    runner = CopyingRunner(plan)
    runner.inexact.update(inexact)
    return World(runner, plan)


def copied(params: GenerationParams, *, inexact: tuple[int, ...] = ()) -> tuple[list[int], Finished, list[int]]:
    """Return tokens, end and the drafted steps' rows of one request on the copying model."""
    world = copying_world(inexact=inexact)
    world.submit("only", REPETITIVE, params)
    world.drain()
    return world.tokens("only"), world.finished("only"), world.runner.drafts


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_speculation_changes_no_token(params: GenerationParams) -> None:
    long = msgspec.structs.replace(params, max_tokens=120, repetition_penalty=1.01, frequency_penalty=0.01)
    plain, plain_end, no_drafts = copied(msgspec.structs.replace(long, speculation=False))
    tokens, end, drafts = copied(long)
    assert no_drafts == []
    assert drafts
    assert (tokens, end.finish_reason, end.usage) == (plain, plain_end.finish_reason, plain_end.usage)


def test_the_end_tells_how_many_drafts_came_true() -> None:
    _, end, drafts = copied(msgspec.structs.replace(GREEDY, max_tokens=120))
    assert end.timings.drafted_tokens == sum(drafts) - len(drafts)
    assert 0 < end.timings.accepted_tokens <= end.timings.drafted_tokens


def test_rows_that_this_machine_computes_otherwise_are_not_used() -> None:
    params = msgspec.structs.replace(GREEDY, max_tokens=120)
    tokens, _, drafts = copied(params, inexact=(4, 6, 8))
    assert set(drafts) <= {2, 3}
    assert (tokens, []) == copied(params, inexact=(2, 3, 4, 6, 8))[::2]


def test_a_stop_inside_a_draft_ends_the_text_there() -> None:
    params = msgspec.structs.replace(GREEDY, max_tokens=120)
    tokens, _, _ = copied(params)
    for stop in sorted(set(tokens)):
        stopped, end, _ = copied(msgspec.structs.replace(params, stop_token_ids=(stop,)))
        assert (stopped, end.finish_reason) == (tokens[: tokens.index(stop)], "stop")


def test_drafts_keep_inside_the_context() -> None:
    world = copying_world()
    world.submit("a", REPETITIVE, GenerationParams(temperature=0.0))
    most = 0
    while not world.scheduler.idle:
        world.step()
        most = max(most, world.runner.cache.offset(0))
    assert 240 < most <= 255
    assert world.finished("a").usage.generated_tokens == 256 - len(REPETITIVE)


def test_a_failing_draft_step_fails_its_request() -> None:
    world = copying_world()
    world.submit("a", REPETITIVE, msgspec.structs.replace(GREEDY, max_tokens=120))
    while not world.runner.drafts:
        world.step()
    world.runner.fail_decode = True
    world.drain()
    assert [event.request_id for event in world.events if isinstance(event, Failed)] == ["a"]
    assert world.scheduler.used_tokens == 0


@given(st.data())
def test_any_schedule_on_a_copying_model_gives_each_request_its_plain_tokens(data: st.DataObject) -> None:
    world = copying_world(slots=3, kv_tokens=500)
    wanted: dict[str, GenerationParams] = {}
    for number in range(data.draw(st.integers(1, 5), "requests")):
        params = GenerationParams(
            max_tokens=data.draw(st.integers(1, 60), "max_tokens"),
            temperature=data.draw(st.sampled_from([0.0, 0.8]), "temperature"),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.05]), "frequency_penalty"),
            seed=number,
        )
        wanted[f"r{number}"] = params
        world.submit(f"r{number}", REPETITIVE, params)
        for _ in range(data.draw(st.integers(0, 30), "steps")):
            world.step()
        if data.draw(st.integers(0, 3), "cancel") == 0:
            world.scheduler.cancel(data.draw(st.sampled_from(sorted(wanted)), "victim"))
    world.drain()
    for request_id, params in wanted.items():
        expected = copied(msgspec.structs.replace(params, speculation=False))[0]
        got = world.tokens(request_id)
        assert got == expected[: len(got)]
        assert len(got) == len(expected) or world.finished(request_id).finish_reason == "cancelled"
    assert world.scheduler.used_tokens == 0


def test_a_chunk_is_small_while_others_decode() -> None:
    plan = memory_plan(slots=2, context=600, chunk=100)
    world = World(ChecksumRunner(plan), plan)
    world.submit("a", [7] * 101, GenerationParams(max_tokens=90, temperature=0.0))
    world.runner.seconds_per_token = 0.004
    world.drain_until(lambda: bool(world.tokens("a")))
    world.submit("b", [8] * 300)
    world.drain_until(lambda: bool(world.tokens("b")))
    # 250 tokens a second for a quarter of a second; and never a single token at the end.
    assert world.runner.prefills == [99, 2, 62, 62, 62, 62, 52]


def test_what_drafts_mapped_is_unmapped_when_their_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot keeps the text for the next prompt, and the rows of a draft would keep it many times over."""
    ended = list[str]()
    plan = memory_plan()
    world = World(CopyingRunner(plan), plan)
    monkeypatch.setattr(KVCache, "unmap_mirrors", lambda _: ended.append("copy"))
    world.submit("copy", REPETITIVE, msgspec.structs.replace(GREEDY, max_tokens=40))
    world.drain()
    world.submit("plain", REPETITIVE, msgspec.structs.replace(GREEDY, speculation=False))
    world.drain()
    assert ended == ["copy"]
