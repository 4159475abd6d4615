from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamplighter_agent.engine.events import Event, Failed, Finished, TextDelta
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.scheduler import Scheduler
from lamplighter_agent.errors import ContextOverflowError, RequestError
from support.toy_engine import DEFAULTS, VOCAB_SIZE, ChecksumRunner, byte_level_tokenizer, memory_plan

TOKENIZER = byte_level_tokenizer()
GREEDY = GenerationParams(max_tokens=6, temperature=0.0)
SEEDED = GenerationParams(max_tokens=6, temperature=1.0, seed=5)


class World:
    """A scheduler on a checksum runner, with a clock that the test moves and all events in one list."""

    def __init__(self, plan: MemoryPlan | None = None, *, max_queued: int = 64, moves_keys: bool = True) -> None:
        plan = memory_plan() if plan is None else plan
        self.now = 100.0
        self.runner = ChecksumRunner(plan, moves_keys=moves_keys)
        self.scheduler = Scheduler(
            self.runner,
            Intake(TOKENIZER, defaults=DEFAULTS, plan=plan, vocab_size=VOCAB_SIZE),
            plan=plan,
            max_queued_requests=max_queued,
            prefixes=self.runner.prefixes,
            clock=lambda: self.now,
        )
        self.events: list[Event] = []

    def submit(self, request_id: str, prompt: list[int], params: GenerationParams = GREEDY) -> None:
        self.scheduler.submit(request_id, prompt, params)

    def step(self) -> list[Event]:
        events = self.scheduler.step()
        self.events += events
        return events

    def drain(self) -> None:
        for _ in range(2000):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError("the scheduler does not become idle")

    def tokens(self, request_id: str) -> list[int]:
        return [
            token
            for event in self.events
            if isinstance(event, TextDelta) and event.request_id == request_id
            for token in event.token_ids
        ]

    def finished(self, request_id: str) -> Finished:
        (event,) = (
            event for event in self.events if not isinstance(event, TextDelta) and event.request_id == request_id
        )
        assert isinstance(event, Finished)
        return event


def alone(prompt: list[int], params: GenerationParams) -> tuple[list[int], str]:
    """Return the tokens and the finish reason of a request that has the engine to itself."""
    world = World()
    world.submit("only", prompt, params)
    world.drain()
    return world.tokens("only"), world.finished("only").finish_reason


def test_a_request_runs_to_its_length() -> None:
    world = World()
    world.submit("a", [1, 2, 3])
    world.drain()
    end = world.finished("a")
    assert (end.finish_reason, end.usage.prompt_tokens, end.usage.generated_tokens) == ("length", 3, 6)
    deltas = [event for event in world.events if isinstance(event, TextDelta)]
    text = "".join(delta.text for delta in deltas) + end.text_tail
    assert text == TOKENIZER.decode(world.tokens("a"))
    assert world.scheduler.idle
    assert world.scheduler.used_tokens == 0


def test_a_prompt_in_chunks_gives_the_same_tokens() -> None:
    prompt = list(range(1, 38))
    results = []
    for chunk in (1, 5, 8, 64):
        world = World(memory_plan(chunk=chunk))
        world.submit("a", prompt)
        world.drain()
        results.append(world.tokens("a"))
        assert max(world.runner.prefills) <= chunk
    assert all(result == results[0] for result in results)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_schedule_gives_each_request_what_it_gets_alone(data: st.DataObject) -> None:
    prefixes = data.draw(st.sampled_from([0, 1000, 100_000]), "prefix cache bytes")
    world = World(memory_plan(slots=3, context=48, kv_tokens=100, chunk=4, prefixes=prefixes))
    wanted: dict[str, tuple[list[int], GenerationParams]] = {}
    cancelled: set[str] = set()
    for number in range(data.draw(st.integers(1, 8), "requests")):
        prompt = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=20), "prompt")
        params = GenerationParams(
            max_tokens=data.draw(st.integers(1, 12), "max_tokens"),
            temperature=data.draw(st.sampled_from([0.0, 1.0]), "temperature"),
            seed=number,
        )
        wanted[f"r{number}"] = (prompt, params)
        world.submit(f"r{number}", prompt, params)
        for _ in range(data.draw(st.integers(0, 6), "steps")):
            world.step()
            assert world.runner.cache.nbytes <= 100 * world.runner.cache.spec.bytes_per_token
        if data.draw(st.booleans(), "cancel"):
            victim = data.draw(st.sampled_from(sorted(wanted)), "victim")
            cancelled.add(victim)
            world.scheduler.cancel(victim)
    world.drain()
    for request_id, (prompt, params) in wanted.items():
        expected, reason = alone(prompt, params)
        got = world.finished(request_id)
        if got.finish_reason == "cancelled":
            assert request_id in cancelled
            assert world.tokens(request_id) == expected[: len(world.tokens(request_id))]
        else:
            assert (world.tokens(request_id), got.finish_reason) == (expected, reason)
    assert world.scheduler.used_tokens == 0
    assert world.runner.prefixes.nbytes <= prefixes


def test_requests_decode_together() -> None:
    world = World()
    for number in range(4):
        world.submit(f"r{number}", [number + 1])
    world.drain()
    assert max(world.runner.batches) == 4
    assert len(world.runner.batches) < 4 * 6


def test_a_long_prompt_delays_the_others_by_one_chunk_a_token() -> None:
    world = World()
    world.submit("short", [1], GenerationParams(max_tokens=5, temperature=0.0))
    for _ in range(2):
        world.step()
    world.submit("long", list(range(1, 41)))
    for expected in range(3, 6):
        world.step()
        assert len(world.tokens("short")) == expected
        assert len(world.runner.prefills) == expected - 1


def test_a_first_token_does_not_wait_for_a_decode_step() -> None:
    world = World()
    world.submit("a", [1, 2])
    world.step()
    assert (len(world.tokens("a")), world.runner.batches) == (1, [])


def test_others_decode_between_the_ends_of_two_prompts() -> None:
    world = World()
    world.submit("a", [1])
    for _ in range(2):
        world.step()
    for request_id in ("b", "c"):
        world.submit(request_id, [2, 3])
    told = []
    for _ in range(4):
        world.step()
        told.append((len(world.runner.prefills), len(world.tokens("a"))))
    assert told == [(2, 2), (2, 3), (3, 3), (3, 4)]


def test_a_short_prompt_overtakes_a_long_one() -> None:
    world = World(memory_plan(chunk=4))
    world.submit("long", list(range(1, 41)))
    world.submit("short", [1, 2])
    for _ in range(2):
        world.step()
    assert world.tokens("short")
    assert not world.tokens("long")
    world.drain()
    assert world.tokens("long") == alone(list(range(1, 41)), GREEDY)[0]


def test_cancel_in_decode_frees_the_slot_at_once() -> None:
    world = World(memory_plan(slots=1))
    world.submit("a", [1, 2])
    world.step()
    world.submit("b", [3])
    world.scheduler.cancel("a")
    assert world.scheduler.running == 0
    events = world.step()
    assert isinstance(events[0], Finished)
    assert (events[0].request_id, events[0].finish_reason) == ("a", "cancelled")
    assert any(isinstance(event, TextDelta) and event.request_id == "b" for event in events)


def test_cancel_in_prefill_frees_the_slot_at_once() -> None:
    world = World(memory_plan(slots=1, chunk=4))
    world.submit("a", list(range(1, 30)))
    world.step()
    world.scheduler.cancel("a")
    assert world.scheduler.running == 0
    assert world.scheduler.used_tokens == 0
    world.drain()
    assert world.finished("a").usage.generated_tokens == 0


def test_cancel_while_waiting_leaves_the_queue() -> None:
    world = World(memory_plan(slots=1))
    world.submit("a", [1])
    world.submit("b", [2])
    world.step()
    world.scheduler.cancel("b")
    assert world.scheduler.waiting == 0
    world.drain()
    assert world.finished("b").finish_reason == "cancelled"
    assert world.finished("a").finish_reason == "length"


def test_cancelling_what_is_unknown_does_nothing() -> None:
    world = World()
    world.scheduler.cancel("never seen")
    assert world.scheduler.idle


@pytest.mark.parametrize("steps", [0, 1], ids=["waiting", "running"])
def test_a_deadline_ends_a_request(steps: int) -> None:
    world = World(memory_plan(slots=1))
    world.submit("first", [9], GenerationParams(max_tokens=3, temperature=0.0))
    world.submit("late", [1], msgspec.structs.replace(GREEDY, deadline_s=105.0))
    for _ in range(3 * steps + steps):
        world.step()
    world.now = 105.0
    world.step()
    assert world.finished("late").finish_reason == "deadline"


def test_a_stop_token_ends_the_text_and_is_not_part_of_it() -> None:
    expected, _ = alone([1, 2, 3], GREEDY)
    world = World()
    world.submit("a", [1, 2, 3], msgspec.structs.replace(GREEDY, stop_token_ids=(expected[3],)))
    world.drain()
    end = world.finished("a")
    assert (end.finish_reason, end.usage.generated_tokens) == ("stop", 4)
    assert world.tokens("a") == expected[:3]


def test_the_packages_end_of_text_stops_unless_ignored() -> None:
    bias = msgspec.structs.replace(GREEDY, logit_bias={0: 50.0})
    assert alone([1], bias) == ([], "stop")
    assert alone([1], msgspec.structs.replace(bias, ignore_eos=True)) == ([0] * 6, "length")


def test_a_stop_string_across_tokens_is_cut_out() -> None:
    text = TOKENIZER.encode("ab", special=False)
    world = World()
    # Both letters are forced: the model then repeats "a" and "b" in an order of its own.
    bias = dict.fromkeys(text, 50.0)
    params = GenerationParams(max_tokens=40, temperature=0.0, logit_bias=bias)
    whole = TOKENIZER.decode(alone([1, 2], params)[0])
    stop = whole[3:5]
    world.submit("a", [1, 2], msgspec.structs.replace(params, stop=(stop,)))
    world.drain()
    deltas = [event.text for event in world.events if isinstance(event, TextDelta)]
    end = world.finished("a")
    assert end.finish_reason == "stop"
    assert "".join(deltas) + end.text_tail == whole[: whole.index(stop)]


def test_min_tokens_puts_a_stop_string_off() -> None:
    bias = {TOKENIZER.encode("a", special=False)[0]: 50.0}
    params = GenerationParams(max_tokens=9, temperature=0.0, logit_bias=bias, stop=("a",), min_tokens=4)
    world = World()
    world.submit("a", [1], params)
    world.drain()
    assert world.finished("a").usage.generated_tokens == 4


def test_log_probabilities_come_with_their_tokens() -> None:
    world = World()
    world.submit("a", [1], msgspec.structs.replace(GREEDY, logprobs=2))
    world.drain()
    deltas = [event for event in world.events if isinstance(event, TextDelta)]
    for delta in deltas:
        assert delta.logprobs is not None
        (report,) = delta.logprobs
        assert (report.token_id,) == delta.token_ids
        assert report.top[0] == (report.token_id, report.logprob)


def test_the_same_seed_gives_the_same_text_and_no_seed_varies() -> None:
    prompt = [3, 4]
    flat = msgspec.structs.replace(SEEDED, temperature=100.0, max_tokens=12)
    assert alone(prompt, flat) == alone(prompt, flat)
    unseeded = msgspec.structs.replace(flat, seed=None)
    assert alone(prompt, unseeded) != alone(prompt, unseeded)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    world = World(memory_plan(context=16))
    with pytest.raises(ContextOverflowError, match="16 tokens, but the context on this machine is 16") as caught:
        world.submit("a", [1] * 16)
    assert caught.value.code == 413
    assert world.scheduler.idle


def test_generation_ends_where_the_context_does() -> None:
    world = World(memory_plan(context=16))
    world.submit("a", [1] * 10, GenerationParams(max_tokens=100, temperature=0.0))
    world.submit("b", [1] * 10, GenerationParams(temperature=0.0))
    world.drain()
    for request_id in ("a", "b"):
        end = world.finished(request_id)
        assert (end.finish_reason, end.usage.generated_tokens) == ("length", 6)


def slid(prompt: list[int], count: int, *, bound: int, keep: int, share: int) -> list[int]:
    """Return the greedy tokens of a model that forgets a part behind ``keep`` whenever it holds ``bound`` tokens."""
    world = World(memory_plan(slots=1, context=bound + 2))
    held, found = list(prompt), list[int]()
    for _ in range(count):
        world.events.clear()
        world.submit("next", held, GenerationParams(max_tokens=1, temperature=0.0, cache_prompt=False))
        world.drain()
        found += world.tokens("next")
        if len(held) == bound:
            del held[keep : keep + (bound - keep) // share]
        held.append(found[-1])
    return found


@pytest.mark.parametrize(("moves_keys", "share"), [(True, 4), (False, 2)], ids=["moved", "computed again"])
@pytest.mark.parametrize("keep", [0, 5])
def test_sliding_goes_on_with_the_first_and_the_recent_tokens(moves_keys: bool, share: int, keep: int) -> None:
    prompt = list(range(1, 13))
    world = World(memory_plan(context=24, chunk=4), moves_keys=moves_keys)
    params = GenerationParams(max_tokens=60, temperature=0.0, on_context_full="slide", keep_tokens=keep)
    world.submit("a", prompt, params)
    world.submit("other", [7, 7])
    while not world.scheduler.idle:
        world.step()
        assert world.runner.cache.offset(0) <= 24
    assert world.tokens("a") == slid(prompt, 60, bound=24, keep=keep, share=share)
    assert world.finished("a").usage.generated_tokens == 60
    assert world.tokens("other") == alone([7, 7], GREEDY)[0]
    # Only what lies before the first gap, or was computed anew, may serve other requests.
    world.submit("after", [*prompt, 200])
    world.drain()
    assert world.tokens("after") == alone([*prompt, 200], GREEDY)[0]


def test_sliding_starts_where_others_hold_the_rest_of_the_plan() -> None:
    world = World(memory_plan(slots=2, context=600, kv_tokens=620))
    world.submit("fixed", [2], GenerationParams(max_tokens=350, temperature=0.0))
    world.submit("open", [1], GenerationParams(temperature=0.0, on_context_full="slide", deadline_s=101.0))
    for _ in range(340):
        world.step()
        assert world.runner.cache.nbytes <= 620 * world.runner.cache.spec.bytes_per_token
    assert len(world.tokens("open")) > 620 - 351
    world.now = 101.0
    world.drain()
    assert world.finished("open").finish_reason == "deadline"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (GenerationParams(keep_tokens=3), "keep_tokens needs on_context_full 'slide'"),
        (GenerationParams(on_context_full="slide", keep_tokens=33), "keep_tokens is 33, but may be at most 32"),
        (GenerationParams(on_context_full="slide", keep_tokens=-1), "keep_tokens is -1"),
        (GenerationParams(on_context_full="slide", num_beams=2), "beam search cannot slide"),
    ],
)
def test_sliding_that_makes_no_sense_is_refused(params: GenerationParams, message: str) -> None:
    world = World()
    with pytest.raises(RequestError, match=message):
        world.submit("a", [1], params)
    assert world.scheduler.idle


def test_no_more_requests_run_than_the_cache_can_hold() -> None:
    world = World(memory_plan(slots=4, context=32, kv_tokens=40))
    for number in range(4):
        world.submit(f"r{number}", [number + 1] * 10, GenerationParams(max_tokens=10, temperature=0.0))
    most = 0
    while not world.scheduler.idle:
        world.step()
        most = max(most, world.scheduler.running)
        assert world.runner.cache.nbytes <= 40 * world.runner.cache.spec.bytes_per_token
    assert most == 2
    assert all(world.finished(f"r{number}").finish_reason == "length" for number in range(4))


def test_an_open_request_ends_when_the_plan_has_no_room_left() -> None:
    world = World(memory_plan(slots=2, context=600, kv_tokens=620))
    world.submit("open", [1], GenerationParams(temperature=0.0))
    world.submit("fixed", [2], GenerationParams(max_tokens=350, temperature=0.0))
    world.drain()
    # One prompt token and a block of 256, then the 12 that the other one leaves.
    assert world.finished("open").usage.generated_tokens == 620 - 351
    assert world.finished("fixed").usage.generated_tokens == 350


def test_a_prompt_that_was_seen_is_not_computed_again() -> None:
    world = World()
    prompt = list(range(1, 31))
    for params in (GREEDY, SEEDED):
        world.submit("again", prompt, params)
        world.drain()
        assert (world.tokens("again"), "length") == alone(prompt, params)
        assert world.finished("again").usage.cached_tokens == (0 if params is GREEDY else 28)
        world.events.clear()
    assert world.runner.prefills == [8, 8, 8, 6, 2]


def test_the_next_turn_of_a_conversation_takes_the_answer_over_too() -> None:
    world = World()
    world.submit("first", [1, 2, 3])
    world.drain()
    turn = [1, 2, 3, *world.tokens("first"), 9, 9]
    world.submit("second", turn)
    world.drain()
    # The last token of an answer was never fed to the model.
    assert world.finished("second").usage.cached_tokens == 3 + 5
    assert (world.tokens("second"), "length") == alone(turn, GREEDY)


def test_a_prefix_is_taken_from_a_request_that_is_still_running() -> None:
    world = World()
    prompt = list(range(1, 21))
    world.submit("running", prompt, GenerationParams(max_tokens=40, temperature=0.0))
    for _ in range(5):
        world.step()
    world.submit("same", [*prompt[:16], 99, 98])
    world.drain()
    assert world.finished("same").usage.cached_tokens == 16
    assert (world.tokens("same"), "length") == alone([*prompt[:16], 99, 98], GREEDY)


def test_what_the_last_request_left_in_its_slot_serves_the_next_one() -> None:
    world = World(memory_plan(prefixes=32))  # no room for any prefix
    prompt = list(range(1, 21))
    world.submit("first", prompt)
    world.drain()
    turn = [*prompt, *world.tokens("first"), 9, 9]
    world.submit("second", turn)
    world.drain()
    assert world.finished("second").usage.cached_tokens == 20 + 5
    assert (world.tokens("second"), "length") == alone(turn, GREEDY)
    world.submit("third", [*prompt[:11], 99, 98])
    world.drain()
    assert world.finished("third").usage.cached_tokens == 11
    assert (world.tokens("third"), "length") == alone([*prompt[:11], 99, 98], GREEDY)


def test_what_a_request_left_goes_when_it_is_to_be_forgotten() -> None:
    world = World()
    world.submit("first", list(range(1, 21)))
    world.drain()
    assert world.runner.cache.nbytes > 0
    world.runner.prefixes.clear()
    world.scheduler.forget()
    assert world.runner.cache.nbytes == 0
    world.submit("second", list(range(1, 21)))
    world.drain()
    assert world.finished("second").usage.cached_tokens == 0


def test_what_a_request_left_makes_room_for_others() -> None:
    world = World(memory_plan(slots=2, context=64, kv_tokens=64))
    world.submit("long", list(range(1, 41)), GenerationParams(max_tokens=2, temperature=0.0, cache_prompt=False))
    world.submit("short", [1, 2], GenerationParams(max_tokens=20, temperature=0.0))
    for _ in range(12):
        world.step()
    slot = world.scheduler.lender.lend(40)
    assert slot == 1
    assert world.runner.cache.nbytes <= 24 * world.runner.cache.spec.bytes_per_token
    world.scheduler.lender.take_back(slot)


def test_a_prompt_of_one_token_serves_no_other() -> None:
    """The kernel for one row computed it, which rounds otherwise than those for prompts."""
    world = World()
    world.submit("first", [5])
    world.drain()
    world.submit("second", [5, 6, 7, 8])
    world.drain()
    assert world.finished("second").usage.cached_tokens == 0


def test_a_request_may_leave_the_prefix_cache_alone() -> None:
    world = World()
    apart = msgspec.structs.replace(GREEDY, cache_prompt=False)
    for request_id, params in (("a", apart), ("b", GREEDY), ("c", apart)):
        world.submit(request_id, [1, 2, 3, 4], params)
        world.drain()
        assert world.finished(request_id).usage.cached_tokens == 0


def test_a_failure_leaves_nothing_in_the_prefix_cache() -> None:
    world = World()
    world.submit("a", [1, 2, 3])
    world.step()
    world.runner.fail_decode = True
    world.step()
    assert world.runner.prefixes.nbytes == 0


def test_a_full_queue_refuses_with_a_hint_when_to_retry() -> None:
    world = World(max_queued=2)
    for number in range(2):
        world.submit(f"r{number}", [1])
    with pytest.raises(RequestError, match="2 requests are already waiting") as caught:
        world.submit("one too many", [1])
    assert caught.value.code == 429
    assert caught.value.retry_after_s is not None


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([VOCAB_SIZE], GREEDY, "outside the vocabulary of 256"),
        ([-1], GREEDY, "outside the vocabulary of 256"),
        ([1], GenerationParams(top_p=2.0), "top_p is 2.0"),
        ([1], GenerationParams(stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids names token 256"),
    ],
)
def test_a_bad_request_is_refused_at_submission(prompt: list[int], params: GenerationParams, message: str) -> None:
    world = World()
    with pytest.raises(RequestError, match=message):
        world.submit("a", prompt, params)
    assert world.scheduler.idle


def test_an_id_in_use_is_refused() -> None:
    world = World()
    world.submit("a", [1])
    with pytest.raises(RequestError, match="already being served") as caught:
        world.submit("a", [1])
    assert caught.value.code == 409


def test_a_failing_prefill_fails_its_request_alone() -> None:
    world = World()
    world.runner.fail_prefill = 77
    world.submit("good", [1, 2])
    world.submit("bad", [5, 77])
    world.drain()
    failed = [event for event in world.events if isinstance(event, Failed)]
    assert [(event.request_id, event.reason) for event in failed] == [("bad", "engine")]
    assert world.tokens("good") == alone([1, 2], GREEDY)[0]
    assert world.scheduler.used_tokens == 0


def test_a_failing_decode_step_fails_the_requests_in_it() -> None:
    world = World()
    world.submit("a", [1])
    world.submit("b", [2])
    for _ in range(3):
        world.step()
    world.runner.fail_decode = True
    events = world.step()
    assert {event.request_id for event in events if isinstance(event, Failed)} == {"a", "b"}
    assert world.scheduler.idle
    assert world.scheduler.used_tokens == 0


def test_timings_tell_queue_prefill_and_decode_apart() -> None:
    world = World(memory_plan(slots=1, chunk=4))
    world.submit("first", [9], GenerationParams(max_tokens=1, temperature=0.0))
    world.submit("a", [1] * 8, GenerationParams(max_tokens=3, temperature=0.0))
    while not world.scheduler.idle:
        world.step()
        world.now += 2.0
    timings = world.finished("a").timings
    assert (timings.queue_s, timings.prefill_s, timings.first_token_s) == (2.0, 2.0, 4.0)
    assert timings.prompt_tokens_per_s == 4.0
    assert timings.decode_s == 4.0
    assert timings.generated_tokens_per_s == 0.5


def test_answers_of_one_request_wait_until_there_is_a_slot_for_each() -> None:
    world = World(memory_plan(slots=3))
    world.submit("a", [1, 2, 3], msgspec.structs.replace(GREEDY, max_tokens=20))
    world.submit("several", [4, 5], msgspec.structs.replace(SEEDED, n=3))
    world.submit("b", [6])
    for _ in range(5):
        world.step()
    assert (world.scheduler.running, world.scheduler.waiting) == (1, 2)
    world.drain()
    assert world.finished("several").usage.generated_tokens == 18
    assert max(world.runner.batches) == 3


def test_answers_keep_to_the_prompt_while_neighbours_come_and_go() -> None:
    world = World(memory_plan(slots=4))
    world.submit("short", [9, 9], msgspec.structs.replace(GREEDY, max_tokens=3))
    world.submit("several", [4, 5, 6, 7, 8, 9, 10, 11, 12, 13], msgspec.structs.replace(SEEDED, n=3))
    world.drain()
    for index in range(3):
        tokens = [
            token
            for event in world.events
            if isinstance(event, TextDelta) and event.request_id == "several" and event.index == index
            for token in event.token_ids
        ]
        seed = msgspec.structs.replace(SEEDED, seed=5 + index)
        assert tokens == alone([4, 5, 6, 7, 8, 9, 10, 11, 12, 13], seed)[0]


def test_an_answer_that_ends_frees_its_slot_and_the_last_ends_the_request() -> None:
    world = World(memory_plan(slots=3))
    world.submit("several", [4, 5], msgspec.structs.replace(SEEDED, n=3, max_tokens=40, ignore_eos=False))
    sizes = set()
    while not world.scheduler.idle:
        world.step()
        sizes.add(world.scheduler.running)
    choices = world.finished("several").choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert sum(choice.generated_tokens for choice in choices) == world.finished("several").usage.generated_tokens
    assert world.scheduler.used_tokens == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("options", [{"n": 3}, {"num_beams": 3, "seed": None, "temperature": None, "n": 2}])
def test_a_cancel_ends_all_answers_with_one_event(options: dict[str, object], steps: int) -> None:
    world = World(memory_plan(slots=4, chunk=2))
    world.submit("several", [4, 5, 6, 7], msgspec.structs.replace(SEEDED, max_tokens=30, **options))
    for _ in range(steps):
        world.step()
    world.scheduler.cancel("several")
    world.step()
    assert world.finished("several").finish_reason == "cancelled"
    assert (world.scheduler.running, world.scheduler.idle, world.scheduler.used_tokens) == (0, True, 0)


def test_a_failing_step_fails_a_request_of_several_answers_once() -> None:
    world = World()
    world.submit("several", [4, 5], msgspec.structs.replace(SEEDED, n=3))
    world.step()
    world.runner.fail_decode = True
    world.drain()
    assert [event.request_id for event in world.events if isinstance(event, Failed)] == ["several"]


def test_answers_that_the_plan_has_no_tokens_for_are_refused() -> None:
    world = World(memory_plan(slots=4, context=64, kv_tokens=100))
    with pytest.raises(RequestError, match="4 answers to 20 prompt tokens need 104 cache tokens") as caught:
        world.submit("several", [1] * 20, msgspec.structs.replace(SEEDED, n=4))
    assert (caught.value.code, caught.value.param) == (413, "n")
