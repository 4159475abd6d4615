"""Continuous batching: requests join and leave while others are generated, inside the memory plan.

Each ``step`` computes at most one prefill chunk and one batched decode step, so a long prompt delays the others' next
token by one chunk, and a cancel or a deadline takes effect within a step.

The slots in use are kept dense, those that decode first: ``0 … decoding-1`` decode together, the following ones are in
prefill, one chunk a step, in turns of the oldest and the one with the least left. Chunks have a fixed size whatever
else is running, and rows of a batch do not mix, so that a request's result depends on the others only as far as the
kernels make it.

Every request reserves cache tokens from the plan's ``kv_tokens``: for prompt and ``max_tokens`` at its start; without
``max_tokens`` for the prompt and a block, which is extended while there is room. So the cache never exceeds the plan.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from lamplighter_agent.engine.detokenizer import TextCodec
from lamplighter_agent.engine.events import Event, Failed, FinishReason
from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prefix_cache import PrefixCache, common_prefix
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.sequence import Sequence
from lamplighter_agent.engine.truncation import Logits
from lamplighter_agent.engine.words import resolve_words
from lamplighter_agent.errors import ContextOverflowError, EngineError, RequestError
from lamplighter_agent.package.manifest import GenerationDefaults

_EXTENSION_TOKENS: Final = 256
_RETRY_AFTER_S: Final = 2.0
_ENDLESS_TOKENS: Final = 2**31 - 1

_MOVED_SHARE: Final = 4
"""Part of the tokens that sliding forgets at once: moving the others is cheap …"""

_COMPUTED_SHARE: Final = 2
"""… and computing them again is not."""


class Runner(Protocol):
    """What computes; see ``runner.ModelRunner``."""

    @property
    def cache(self) -> KVCache:
        """The cache whose slots the scheduler assigns."""

    def prefill(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the logits behind the last one."""

    def decode(self, tokens: list[int]) -> Logits:
        """Append a token to each of the first slots and return a row of logits for each."""


class Scheduler:
    """Drives a runner for many requests. Not thread-safe: one thread calls everything.

    Args:
        runner: Computes prefill chunks and decode steps.
        codec: Turns tokens into text and back.
        defaults: The package's stop tokens and sampling defaults.
        plan: Slots, context and cache tokens to keep to.
        vocab_size: Tokens that may occur.
        max_queued_requests: Requests that may wait for a slot.
        prefixes: Where the tokens of ended requests are kept for later ones; None: nowhere.
        clock: Monotonic seconds; deadlines are on this clock.
    """

    def __init__(
        self,
        runner: Runner,
        codec: TextCodec,
        *,
        defaults: GenerationDefaults,
        plan: MemoryPlan,
        vocab_size: int,
        max_queued_requests: int,
        prefixes: PrefixCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._codec = codec
        self._defaults = defaults
        self._plan = plan
        self._vocab_size = vocab_size
        self._max_queued = max_queued_requests
        self._prefixes = prefixes
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._slots: list[Sequence] = []
        self._decoding = 0
        self._reserved = 0
        self._oldest_turn = True
        self._closing: list[Event] = []

    @property
    def idle(self) -> bool:
        """True if a step would do nothing."""
        return not (self._waiting or self._slots or self._closing)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, request_id: str, prompt_tokens: list[int], params: GenerationParams) -> None:
        """Accept a request; its events come from ``step``.

        Raises:
            RequestError: If an option or a token is out of range, the id is in use (409), or the queue is full (429).
            ContextOverflowError: If the prompt leaves no room for a token.
        """
        params.validate()
        params.check_vocabulary(self._vocab_size)
        _check_supported(params)
        self._check_prompt(prompt_tokens)
        if self._find(request_id) is not None:
            raise RequestError(f"request {request_id!r} is already being served", code=409, param="id")
        if len(self._waiting) >= self._max_queued:
            raise RequestError(
                f"{len(self._waiting)} requests are already waiting", code=429, retry_after_s=_RETRY_AFTER_S
            )
        room = self._plan.max_context_tokens - len(prompt_tokens)
        params = params.with_defaults(self._defaults)
        if params.on_context_full == "slide":
            room = _ENDLESS_TOKENS
            params = msgspec.structs.replace(params, keep_tokens=self._keep_tokens(prompt_tokens, params))
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self._waiting.append(
            Sequence(
                request_id,
                list(prompt_tokens),
                params,
                sampler=self._sampler(prompt_tokens, params, limit),
                limit=limit,
                decoder=self._codec,
                submitted_s=self._clock(),
            )
        )

    def cancel(self, request_id: str) -> None:
        """End a request now; its slot is free at once and ``step`` reports it. Unknown ids have ended before."""
        sequence = self._find(request_id)
        if sequence is not None:
            self._close(sequence, "cancelled", self._closing)

    def step(self) -> list[Event]:
        """Do one round: end what is over, admit what fits, one prefill chunk, one decode step; return what happened."""
        events, self._closing = self._closing, []
        now = self._clock()
        for sequence in [*self._slots, *self._waiting]:
            if sequence.deadline_s is not None and now >= sequence.deadline_s:
                self._close(sequence, "deadline", events)
        self._admit(now)
        if self._decoding < len(self._slots):
            self._prefill_chunk(events)
        if self._decoding:
            self._decode_step(events)
        return events

    def _sampler(self, prompt_tokens: list[int], params: GenerationParams, limit: int) -> Sampler:
        eos = () if params.ignore_eos else self._defaults.eos_token_ids
        return Sampler(
            params,
            History(prompt_tokens),
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            vocab_size=self._vocab_size,
            words=resolve_words(params, self._codec, limit=limit),
        )

    def _check_prompt(self, tokens: list[int]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty", param="prompt")
        if len(tokens) >= self._plan.max_context_tokens:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens, but the context on this machine is "
                f"{self._plan.max_context_tokens} tokens for prompt and text",
                code=413,
                param="prompt",
                hint="shorten the prompt, or raise max_context_tokens or the memory budget",
            )
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise RequestError(
                f"the prompt holds a token id outside the vocabulary of {self._vocab_size}", param="prompt"
            )

    def _keep_tokens(self, prompt_tokens: list[int], params: GenerationParams) -> int:
        context = self._plan.max_context_tokens
        if params.keep_tokens is None:
            return min(len(prompt_tokens), context // 4)
        if params.keep_tokens > context // 2:
            raise RequestError(
                f"keep_tokens is {params.keep_tokens}, but may be at most {context // 2}, half the context",
                param="keep_tokens",
            )
        return params.keep_tokens

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in (*self._slots, *self._waiting):
            if sequence.request_id == request_id:
                return sequence
        return None

    def _admit(self, now: float) -> None:
        """Give slots to waiting requests in their order, as long as slot and cache tokens are there."""
        while self._waiting and len(self._slots) < self._plan.slots:
            sequence = self._waiting[0]
            ahead = min(sequence.limit, _EXTENSION_TOKENS) if sequence.open_ended else sequence.limit
            wanted = min(len(sequence.prompt) + ahead, self._plan.max_context_tokens)
            if self._reserved + wanted > self._plan.kv_tokens:
                return
            self._waiting.popleft()
            self._reserved += wanted
            sequence.reserved = wanted
            sequence.start(now)
            self._slots.append(sequence)
            self._reuse_prefix(sequence, len(self._slots) - 1)

    def _reuse_prefix(self, sequence: Sequence, slot: int) -> None:
        """Copy the longest beginning of the prompt that a slot or the prefix cache holds.

        The last token is left, since its logits are needed, and the one before it, for ``chunk_length``'s reason.
        """
        if self._prefixes is None or not sequence.cache_prompt:
            return
        cache, wanted = self._runner.cache, sequence.prompt[:-2]
        shared = [(common_prefix(cache.prefix(other), wanted), other) for other in range(slot)]
        length, other = max(shared, default=(0, slot))
        if length > self._prefixes.recall(wanted, beyond=length):
            cache.copy(other, slot, length)
            sequence.reuse(length)
        else:
            sequence.reuse(self._prefixes.restore(cache, slot, wanted))

    def _prefill_chunk(self, events: list[Event]) -> None:
        candidates = self._slots[self._decoding :]
        if self._oldest_turn:
            sequence = min(candidates, key=lambda other: other.started_s)
        else:
            sequence = min(candidates, key=lambda other: other.remaining)
        self._oldest_turn = not self._oldest_turn
        slot = self._slots.index(sequence)
        tokens = sequence.remaining_prompt(self._plan.prefill_chunk_tokens)
        try:
            logits = self._runner.prefill(slot, tokens)
        except EngineError as error:
            self._fail(sequence, error, events)
            return
        sequence.prefilled += len(tokens)
        if not sequence.in_prefill:
            self._exchange(slot, self._decoding)
            self._decoding += 1
            self._take(sequence, logits, events)

    def _decode_step(self, events: list[Event]) -> None:
        now = self._clock()
        for sequence in self._slots[: self._decoding]:
            if not self._extend(sequence) and not self._slide(sequence):
                self._close(sequence, "length", events, now=now)
        batch = self._slots[: self._decoding]
        if not batch:
            return
        try:
            logits = self._runner.decode([sequence.last_token for sequence in batch])
        except EngineError as error:
            for sequence in batch:
                self._fail(sequence, error, events)
            return
        for sequence, row in zip(batch, logits, strict=True):
            self._take(sequence, row, events)

    def _take(self, sequence: Sequence, logits: Logits, events: list[Event]) -> None:
        now = self._clock()
        try:
            delta, reason = sequence.take(logits, now)
        except EngineError as error:
            self._fail(sequence, error, events)
            return
        if delta is not None:
            events.append(delta)
        if reason is not None:
            self._close(sequence, reason, events, now=now)

    def _extend(self, sequence: Sequence) -> bool:
        """Make sure that the next token's place is reserved; False if the plan has no room left."""
        needed = self._runner.cache.offset(self._slots.index(sequence)) + 1
        if needed <= sequence.reserved:
            return True
        most = min(len(sequence.prompt) + sequence.limit, self._plan.max_context_tokens)
        more = min(_EXTENSION_TOKENS, most - sequence.reserved, self._plan.kv_tokens - self._reserved)
        if more <= 0:
            return False
        sequence.reserved += more
        self._reserved += more
        return True

    def _slide(self, sequence: Sequence) -> bool:
        """Forget tokens behind the kept ones to make room for more; False if the request does not want that.

        Where the keys of the model cannot be moved, what is left is computed again as a prompt is, chunk by chunk.
        """
        if not sequence.slides:
            return False
        cache, slot = self._runner.cache, self._slots.index(sequence)
        tokens, keep = cache.tokens(slot), min(sequence.keep, cache.offset(slot) // 2)
        if cache.can_evict:
            cache.evict(slot, keep, max((len(tokens) - keep) // _MOVED_SHARE, 1))
            return True
        recent = tokens[keep + max((len(tokens) - keep) // _COMPUTED_SHARE, 1) :]
        cache.trim(slot, len(tokens) - keep)
        sequence.compute_again([*tokens[:keep], *recent, sequence.last_token], keep)
        self._decoding -= 1
        self._exchange(slot, self._decoding)
        return True

    def _close(
        self, sequence: Sequence, reason: FinishReason, events: list[Event], *, now: float | None = None
    ) -> None:
        events.append(sequence.finish(reason, self._clock() if now is None else now))
        self._remove(sequence)

    def _fail(self, sequence: Sequence, error: EngineError, events: list[Event]) -> None:
        events.append(Failed(sequence.request_id, error.reason, error.message))
        self._remove(sequence, keep=False)

    def _remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a request out of the queue or its slot, keep the slots dense and give the cache's memory back.

        Its tokens go to the prefix cache unless a failure makes them doubtful.
        """
        if sequence not in self._slots:
            self._waiting.remove(sequence)
            return
        slot = self._slots.index(sequence)
        cache = self._runner.cache
        if keep and self._prefixes is not None and sequence.cache_prompt:
            self._prefixes.store(cache, slot, len(cache.prefix(slot)))
        cache.trim(slot, cache.capacity)
        if slot < self._decoding:
            self._decoding -= 1
            self._exchange(slot, self._decoding)
            slot = self._decoding
        last = len(self._slots) - 1
        self._exchange(slot, last)
        self._slots.pop()
        cache.release(last)
        self._reserved -= sequence.reserved

    def _exchange(self, first: int, second: int) -> None:
        if first != second:
            self._runner.cache.swap(first, second)
            self._slots[first], self._slots[second] = self._slots[second], self._slots[first]


def _check_supported(params: GenerationParams) -> None:
    given = {"n": params.n > 1, "num_beams": params.num_beams > 1, "echo": params.echo, "guided": params.guided}
    for name, wanted in given.items():
        if wanted:
            raise RequestError(f"{name} is not supported yet", param=name)
