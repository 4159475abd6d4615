"""The queue between transports and worker: order, bounds, deadlines, cancel, once only, and a change of worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from lamplighter_agent.config import RequestsConfig
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError
from lamplighter_agent.service import admission
from lamplighter_agent.service import ticket as ticket_module
from lamplighter_agent.service.admission import RequestQueue, most_tokens
from lamplighter_agent.service.answers import Answer
from lamplighter_agent.service.ticket import GenerationRequest, Ticket
from lamplighter_agent.service.worker import EngineWorker, WorkerSpec
from lamplighter_agent.service.worker_messages import Prompt
from support.workers import running


def request(text: str, request_id: str = "r", sender: str = "a", **changes: object) -> GenerationRequest:
    base = GenerationRequest(id=request_id, sender=sender, prompt=Prompt(text=text), params=GenerationParams())
    return msgspec.structs.replace(base, **changes)


async def finish(ticket: Ticket | None) -> Answer:
    assert ticket is not None
    async for event in ticket:
        if isinstance(event, Answer):
            return event
    raise AssertionError("the ticket ended without an answer")


def with_queue(
    spec: WorkerSpec, scenario: Callable[[RequestQueue, EngineWorker], Awaitable[None]], queue_size: int = 2
) -> None:
    async def run() -> None:
        one_slot = msgspec.structs.replace(spec, options=msgspec.structs.replace(spec.options, slots=1))
        async with running(one_slot) as worker:
            queue = RequestQueue(RequestsConfig(queue_size=queue_size, max_tokens=1000))
            queue.attach(worker)
            await scenario(queue, worker)

    asyncio.run(run())


def test_requests_are_answered_in_order_and_counted(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        order: list[str] = []

        async def follow(ticket: Ticket | None) -> None:
            order.append((await finish(ticket)).text)

        tickets = [queue.submit(request(name, name)) for name in ("one", "two", "three")]
        assert (queue.active, queue.depth) == (1, 2)
        await asyncio.gather(*map(follow, tickets))
        assert order == ["You said: one", "You said: two", "You said: three"]
        assert queue.counters.accepted == 3
        assert queue.counters.generated_tokens == len("".join(order))

    with_queue(spec, scenario)


def test_one_too_many_is_refused_with_429(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        for number in range(3):
            queue.submit(request("/slow", str(number)))
        with pytest.raises(RequestError) as caught:
            queue.submit(request("x", "one too many"))
        assert (caught.value.code, queue.counters.refused) == (429, 1)
        assert caught.value.retry_after_s is not None

    with_queue(spec, scenario)


def test_a_request_that_waits_for_all_its_time_is_408(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        queue.submit(request("/slow", "first"))
        with pytest.raises(RequestError) as caught:
            await finish(queue.submit(request("x", "second", deadline_s=0.1)))
        assert (caught.value.code, queue.depth) == (408, 0)

    with_queue(spec, scenario)


def test_the_deadline_counts_from_arrival_and_ends_the_answer(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        answer = await finish(queue.submit(request("/slow", deadline_s=0.2)))
        assert answer.finish_reason == "deadline"
        assert answer.text.startswith("slow")

    with_queue(spec, scenario)


def test_an_answer_that_nobody_reads_ends_and_is_bounded(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_module, "MAX_UNREAD", 50)

    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        unread = queue.submit(request("/count 2000"))
        following = await finish(queue.submit(request("next", "next")))
        assert following.text == "You said: next"
        assert unread is not None
        for _piece in range(50):
            assert isinstance(await anext(unread), TextDelta)
        with pytest.raises(RequestError, match="50 pieces of the answer were left unread") as caught:
            await anext(unread)
        assert caught.value.code == 499

    with_queue(spec, scenario)


def test_an_answer_has_a_most_length_whatever_is_asked_for(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_HELD_TOKENS", 60)

    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        params = GenerationParams(max_tokens=10**9)
        answer = await finish(queue.submit(request("/count 2000", params=params)))
        assert (answer.usage.generated_tokens, answer.finish_reason) == (60, "length")

    with_queue(spec, scenario)


def test_log_probabilities_and_several_answers_make_the_most_length_shorter() -> None:
    assert most_tokens(GenerationParams()) == 131_072
    assert most_tokens(GenerationParams(logprobs=0)) == 65_536
    assert most_tokens(GenerationParams(logprobs=20, n=2)) == 131_072 // 44


def test_cancel_by_id_respects_the_sender(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        running_ticket = queue.submit(request("/slow", "x", "a"))
        waiting_ticket = queue.submit(request("/slow", "x", "b"))
        assert queue.cancel("x", "c") == 0
        assert queue.cancel("x", "b") == 1
        with pytest.raises(RequestError) as caught:
            await finish(waiting_ticket)
        assert caught.value.code == 499
        assert running_ticket is not None
        await anext(running_ticket)
        assert queue.cancel("x") == 1
        assert (await finish(running_ticket)).finish_reason == "cancelled"

    with_queue(spec, scenario)


def test_a_cancel_that_comes_before_the_worker_knows_the_request_is_not_lost(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, worker: EngineWorker) -> None:
        ticket = queue.submit(request("/slow"))
        assert (queue.active, worker.active) == (1, 0)
        queue.cancel("r")
        with pytest.raises(RequestError) as caught:
            await finish(ticket)
        assert caught.value.code == 499

    with_queue(spec, scenario)


def test_an_idempotent_request_is_accepted_once_a_sender(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        first = queue.submit(request("x", idempotent=True))
        assert queue.submit(request("x", idempotent=True)) is None
        other_sender = queue.submit(request("x", sender="b", idempotent=True))
        await finish(first)
        await finish(other_sender)
        assert queue.submit(request("x", idempotent=True)) is None
        with pytest.raises(RequestError) as caught:
            queue.submit(request("y", idempotent=True))
        assert (caught.value.code, caught.value.param) == (409, "id")

    with_queue(spec, scenario)


def test_an_id_is_forgotten_after_its_deadline(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        await finish(queue.submit(request("/slow", idempotent=True, deadline_s=0.1)))
        assert (await finish(queue.submit(request("y", idempotent=True)))).text == "You said: y"

    with_queue(spec, scenario)


def test_another_model_is_404_and_the_packages_names_are_not(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        with pytest.raises(RequestError) as caught:
            queue.submit(request("x", model="gpt-4"))
        assert (caught.value.code, caught.value.param) == (404, "model")
        for model in (None, "default", "fake", "fake/1"):
            await finish(queue.submit(request("x", model=model)))

    with_queue(spec, scenario)


def test_waiting_requests_go_to_the_new_worker_and_running_ones_stay(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, _: EngineWorker) -> None:
        running_ticket = queue.submit(request("/slow", "old", deadline_s=1.0))
        waiting_ticket = queue.submit(request("x", "new"))
        async with running(spec) as other:
            queue.attach(other)
            assert (await finish(waiting_ticket)).text == "You said: x"
            assert (await finish(running_ticket)).finish_reason == "deadline"

    with_queue(spec, scenario)


def test_requests_wait_while_no_worker_is_there_and_are_refused_when_none_will_come(spec: WorkerSpec) -> None:
    async def scenario(queue: RequestQueue, worker: EngineWorker) -> None:
        queue.detach()
        ticket = queue.submit(request("x"))
        assert queue.depth == 1
        queue.attach(worker)
        await finish(ticket)
        queue.detach()
        late = queue.submit(request("y", "late"))
        queue.close(RequestError("stopping", code=503))
        queue.attach(worker)  # a worker that was starting meanwhile
        with pytest.raises(RequestError, match="stopping"):
            await finish(late)
        with pytest.raises(RequestError, match="stopping"):
            queue.submit(request("z", "later"))

    with_queue(spec, scenario)
