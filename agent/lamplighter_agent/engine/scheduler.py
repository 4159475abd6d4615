"""Continuous batching: requests join and leave while others are generated, inside the memory plan.

Each ``step`` computes at most one prefill chunk and one batched decode step, so a long prompt delays the others' next
token by one chunk, and a cancel or a deadline takes effect within a step.

The slots in use are kept dense, those that decode first: ``0 … decoding-1`` decode together, the following ones are in
prefill, one chunk a step, in turns of the oldest and the one with the least left. A chunk is smaller while others
decode, so that it keeps their tokens waiting no longer than a bearable moment (``pace``). Rows of a batch do not mix,
and the kernels give a token of a prompt the same bits in any chunk of at least two. The kernels for one row and for
several decoded together give the same bits with AVX-512 and differ in the last one with AVX2 alone; so there a near-tie
between two tokens may fall otherwise when a request is not alone. A request that decodes alone may be given several
tokens a step, where the bits are the same (``speculation``).

Every request reserves cache tokens from the plan's ``kv_tokens``: for prompt and ``max_tokens`` at its start; without
``max_tokens`` for the prompt and a block, which is extended while there is room. So the cache never exceeds the plan.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from lamplighter_agent.engine.beam_sequence import BeamSequence
from lamplighter_agent.engine.detokenizer import TextCodec
from lamplighter_agent.engine.embedding import EmbeddingSequence
from lamplighter_agent.engine.events import Event, Failed, FinishReason
from lamplighter_agent.engine.intake import EXTENSION_TOKENS, Intake
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.loans import Loans
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.pace import ChunkPace
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prefix_cache import PrefixCache, common_prefix
from lamplighter_agent.engine.sampling import Scorer
from lamplighter_agent.engine.sequence import Sequence, chunk_length
from lamplighter_agent.engine.speculation import WIDTHS, Speculator, StepCosts
from lamplighter_agent.engine.truncation import Logits
from lamplighter_agent.errors import EngineError, RequestError
from lamplighter_agent.package.manifest import GenerationDefaults

_RETRY_AFTER_S: Final = 2.0

_MOVED_SHARE: Final = 4
"""Part of the tokens that sliding forgets at once: moving the others is cheap …"""

_COMPUTED_SHARE: Final = 2
"""… and computing them again is not."""

_ECHO_CHUNK_TOKENS: Final = 8
"""Prompt tokens computed at once where the logits behind each are wanted: rows of a vocabulary's width are large."""


class Runner(Protocol):
    """What computes; see ``runner.ModelRunner``."""

    @property
    def cache(self) -> KVCache:
        """The cache whose slots the scheduler assigns."""

    def prefill(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the logits behind the last one."""

    def prefill_rows(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the logits behind each."""

    @property
    def hidden_size(self) -> int | None:
        """Features of a hidden state; None if there are none to be had."""

    def hidden_states(self, slot: int, tokens: list[int]) -> Logits:
        """Append tokens to a slot and return the last hidden state of each."""

    def decode(self, tokens: list[int]) -> Logits:
        """Append a token to each of the first slots and return a row of logits for each."""

    def verify(self, tokens: list[int]) -> Logits:
        """Append tokens to slot 0 and return a row of logits for each, the same as from ``decode`` one by one."""

    def exactness(self, rows: int) -> bool | None:
        """Return whether ``verify`` takes this many tokens in one step; None if the first time will tell."""


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
        speculation: Verify drafts from the text so far when one request decodes alone; changes no text.
        clock: Monotonic seconds; deadlines are on this clock.

    Attributes:
        intake: Checks requests.
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
        speculation: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self.intake = Intake(codec, defaults=defaults, plan=plan, vocab_size=vocab_size)
        self._plan = plan
        self._loans = Loans(plan)
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
        self._costs = StepCosts() if speculation else None
        self._pace = ChunkPace(plan.prefill_chunk_tokens)

    @property
    def idle(self) -> bool:
        """True if a step would do nothing."""
        return not (self._waiting or self._slots or self._closing)

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(
        self, request_id: str, prompt_tokens: list[int], params: GenerationParams, *, scorer: Scorer | None = None
    ) -> None:
        """Accept a request; its events come from ``step``.

        Raises:
            RequestError: If an option or a token is out of range, the id is in use (409), or the queue is full (429).
            ContextOverflowError: If the prompt leaves no room for a token.
        """
        self._enqueue(self.intake.sequence(request_id, prompt_tokens, params, now=self._clock(), scorer=scorer))

    def submit_embedding(self, request_id: str, tokens: list[int], *, deadline_s: float | None = None) -> None:
        """Accept a text whose embedding is wanted; it comes with the ``Finished`` event.

        Raises:
            RequestError: If the package gives none, or as ``submit``.
            ContextOverflowError: If the text does not fit.
        """
        size = self._runner.hidden_size
        self._enqueue(
            self.intake.embedding(request_id, tokens, now=self._clock(), hidden_size=size, deadline_s=deadline_s)
        )

    def _enqueue(self, sequence: Sequence) -> None:
        request_id = sequence.request_id
        if self._find(request_id) is not None:
            raise RequestError(f"request {request_id!r} is already being served", code=409, param="id")
        if sequence.width > self._loans.slots_left or self.intake.first_tokens(sequence) > self._loans.tokens_left:
            raise RequestError("live sequences hold the slots that it needs", code=429, hint="close one first")
        if len(self._waiting) >= self._max_queued:
            raise RequestError(
                f"{len(self._waiting)} requests are already waiting", code=429, retry_after_s=_RETRY_AFTER_S
            )
        self._waiting.append(sequence)

    @property
    def cache(self) -> KVCache:
        """The cache, of which slots can be lent."""
        return self._runner.cache

    def lend_slot(self, tokens: int) -> int:
        """Lend a slot with room for ``tokens`` tokens to a caller that computes in it.

        Raises:
            RequestError: If there is none, or not that much room (429).
        """
        slot = self._loans.lend(tokens, slots_held=self._held_slots, tokens_held=self._reserved)
        self.cache.plan(slot, tokens)
        return slot

    def compute_lent(self, slot: int, tokens: list[int]) -> Logits:
        """Compute what a lent slot lacks of ``tokens``; return the logits behind the last one.

        Raises:
            EngineError: If the model fails; what was computed stays.
        """
        logits: Logits | None = None
        while (done := self.cache.offset(slot)) < len(tokens):
            length = chunk_length(len(tokens) - done, self._plan.prefill_chunk_tokens)
            logits = self._runner.prefill(slot, tokens[done : done + length])
        assert logits is not None, "the slot holds the last token, whose logits are wanted"
        return logits

    def take_back_slot(self, slot: int) -> None:
        """End a loan and empty the slot."""
        self._loans.take_back(slot)
        self.cache.release(slot)

    @property
    def _held_slots(self) -> int:
        return sum(sequence.slots for sequence in self._slots)

    def cancel(self, request_id: str) -> None:
        """End a request now; its slot is free at once and ``step`` reports it. Unknown ids have ended before."""
        while (sequence := self._find(request_id)) is not None:
            self._close(sequence, "cancelled", self._closing)

    def step(self) -> list[Event]:
        """Do one round: end what is over, admit what fits, one prefill chunk, one decode step; return what happened."""
        events, self._closing = self._closing, []
        now = self._clock()
        for sequence in [*self._slots, *self._waiting]:
            deadline_s = sequence.request.params.deadline_s
            if deadline_s is not None and now >= deadline_s and self._holds(sequence):
                self._close(sequence, "deadline", events)
        self._admit(now)
        if self._decoding < len(self._slots):
            self._prefill_chunk(events)
        if self._decoding:
            self._decode_step(events)
        return events

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in (*self._slots, *self._waiting):
            if sequence.request_id == request_id:
                return sequence
        return None

    def _holds(self, sequence: Sequence) -> bool:
        """Tell whether a sequence is still there: closing one beam closes the others."""
        return sequence in self._slots or sequence in self._waiting

    def _admit(self, now: float) -> None:
        """Give slots to waiting requests in their order, as long as slot and cache tokens are there."""
        while self._waiting:
            sequence = self._waiting[0]
            # Slots and tokens of all answers are held from the start, so that branching cannot fail.
            wanted = self.intake.first_tokens(sequence)
            if self._held_slots + sequence.width > self._loans.slots_left:
                return
            if self._reserved + wanted > self._loans.tokens_left:
                return
            self._waiting.popleft()
            self._reserved += wanted
            sequence.reserved = wanted
            sequence.request.start(now)
            self._slots.append(sequence)
            # Beams step together, so that none of them can be computed again on the way.
            ahead = sequence.limit if sequence.together else 0
            self._runner.cache.plan(len(self._slots) - 1, len(sequence.prompt) + ahead)
            self._reuse_prefix(sequence, len(self._slots) - 1)

    def _reuse_prefix(self, sequence: Sequence, slot: int) -> None:
        """Copy the longest beginning of the prompt that a slot or the prefix cache holds.

        The last token is left, since its logits are needed, and the one before it, for ``chunk_length``'s reason.
        """
        if self._prefixes is None or not sequence.cache_prompt:
            return
        cache, wanted = self._runner.cache, sequence.prompt[:-2]
        if cache.rope_tokens(slot):
            return  # kept prefixes have keys of the short factors
        shared = [(common_prefix(cache.prefix(other), wanted), other) for other in range(slot)]
        length, other = max(shared, default=(0, slot))
        if length > self._prefixes.recall(wanted, beyond=length):
            cache.copy(other, slot, length)
        else:
            length = self._prefixes.restore(cache, slot, wanted)
        sequence.prefilled = sequence.request.cached = length

    def _prefill_chunk(self, events: list[Event]) -> None:
        candidates = self._slots[self._decoding :]
        if self._oldest_turn:
            sequence = min(candidates, key=lambda other: other.request.started_s)
        else:
            sequence = min(candidates, key=lambda other: other.remaining)
        self._oldest_turn = not self._oldest_turn
        slot = self._slots.index(sequence)
        try:
            logits = self._compute_chunk(sequence, slot)
        except EngineError as error:
            self._fail(sequence, error, events)
            return
        if sequence.in_prefill:
            return
        if isinstance(sequence, EmbeddingSequence):
            self._close(sequence, "stop", events)
        else:
            self._exchange(slot, self._decoding)
            self._decoding += 1
            rows = self._branch(sequence)
            self._take(rows, [logits] * len(rows), events)

    def _compute_chunk(self, sequence: Sequence, slot: int) -> Logits:
        """Compute the next chunk of a prompt; return the logits behind its last token."""
        request = sequence.request
        if request.wants_prompt_logprobs:
            tokens = sequence.remaining_prompt(min(_ECHO_CHUNK_TOKENS, self._plan.prefill_chunk_tokens))
            rows = self._runner.prefill_rows(slot, tokens)
            request.note_prompt_logits(rows, self.intake.vocab_size)
            logits: Logits = rows[-1]
        elif isinstance(sequence, EmbeddingSequence):
            tokens = sequence.remaining_prompt(self._pace.tokens(others_wait=self._decoding > 0))
            logits = self._runner.hidden_states(slot, tokens)
            sequence.add(logits)
        else:
            tokens = sequence.remaining_prompt(self._pace.tokens(others_wait=self._decoding > 0))
            begun = self._clock()
            logits = self._runner.prefill(slot, tokens)
            self._pace.observe(len(tokens), self._clock() - begun)
        sequence.prefilled += len(tokens)
        return logits

    def _branch(self, sequence: Sequence) -> list[Sequence]:
        """Give each other answer, or beam, a slot with a copy of the prompt; return them all.

        ``_admit`` has kept slots and tokens for them.
        """
        cache, others = self._runner.cache, sequence.branches()
        source, share = self._decoding - 1, sequence.reserved // (1 + len(others))
        sequence.reserved = share
        for other in others:
            other.reserved = share
            last = len(self._slots)
            self._slots.append(other)
            cache.copy(source, last, cache.offset(source))
            self._exchange(last, self._decoding)
            self._decoding += 1
        return [sequence, *others]

    def _decode_step(self, events: list[Event]) -> None:
        now = self._clock()
        for sequence in self._slots[: self._decoding]:
            if self._holds(sequence) and not self._extend(sequence) and not self._slide(sequence):
                self._close(sequence, "length", events, now=now)
        for sequence in self._slots[: self._decoding]:
            self._take_long_factors(sequence)
        batch = self._slots[: self._decoding]
        if not batch:
            return
        draft = self._draft(batch)
        begun, telling = self._clock(), len(batch) == 1
        try:
            if draft:
                # The first of its kind is computed in more than one way, and tells nothing about costs.
                telling = bool(self._runner.exactness(1 + len(draft)))
                logits = self._runner.verify([batch[0].last_token, *draft])
            else:
                logits = self._runner.decode([sequence.last_token for sequence in batch])
        except EngineError as error:
            for sequence in batch:
                self._fail(sequence, error, events)
            return
        if telling and self._costs is not None:
            self._costs.observe(1 + len(draft), self._clock() - begun)
        if draft:
            self._take_draft(batch[0], draft, logits, events)
            return
        self._take(batch, list(logits), events)
        for sequence in batch:
            if sequence.speculator is not None:
                sequence.speculator.note([sequence.last_token])

    def _draft(self, batch: list[Sequence]) -> list[int]:
        """Return tokens that may come next for a request that decodes alone; none where it would not pay."""
        sequence = batch[0]
        if self._costs is None or len(batch) > 1 or not sequence.request.params.speculation:
            return []
        if sequence.speculator is None:
            sequence.speculator = Speculator([*sequence.prompt, sequence.last_token], self._costs)
        room = min(sequence.reserved - self._runner.cache.offset(0), self._runner.cache.room(0))
        usable = tuple(rows for rows in WIDTHS if self._runner.exactness(rows) is not False)
        draft = sequence.speculator.draft(min(room, sequence.limit - sequence.generated) - 1, usable)
        sequence.request.drafted += len(draft)
        return draft

    def _take_draft(self, sequence: Sequence, draft: list[int], logits: Logits, events: list[Event]) -> None:
        """Draw tokens as long as they agree with a draft; the cache keeps those alone."""
        cache, drawn = self._runner.cache, list[int]()
        cache.trim(0, len(draft))
        for row, sequence.guess in zip(logits, [*draft, None], strict=True):
            self._take([sequence], [row], events)
            drawn.append(sequence.last_token)
            if not self._holds(sequence) or sequence.last_token != sequence.guess:
                break
            cache.advance(0, [sequence.last_token])
        sequence.guess = None
        if sequence.speculator is not None:
            sequence.speculator.note(drawn)

    def _take(self, batch: list[Sequence], logits: list[Logits], events: list[Event]) -> None:
        """Draw the next tokens: of sampled answers one by one, of beams those of a request together."""
        rows = dict(zip(batch, logits, strict=True))
        for sequence, row in rows.items():
            if not self._holds(sequence):
                continue
            if isinstance(sequence, BeamSequence):
                if sequence.leads:
                    self._take_beams(sequence, rows, events)
                continue
            now = self._clock()
            try:
                drawn, reason = sequence.take(row, now)
            except EngineError as error:
                self._fail(sequence, error, events)
                continue
            events += drawn
            if reason is not None:
                self._close(sequence, reason, events, now=now)

    def _take_beams(self, leader: BeamSequence, rows: dict[Sequence, Logits], events: list[Event]) -> None:
        now, cache = self._clock(), self._runner.cache
        try:
            moves, reason = leader.take_beams(rows, now)
        except EngineError as error:
            self._fail(leader, error, events)
            return
        for source, target in moves:
            slot = self._slots.index(source)
            cache.copy(slot, self._slots.index(target), cache.offset(slot), start=len(leader.prompt))
        if reason is not None:
            self._close(leader, reason, events, now=now)

    def _extend(self, sequence: Sequence) -> bool:
        """Make sure that the next token's place is reserved; False if the plan has no room left."""
        needed = self._runner.cache.offset(self._slots.index(sequence)) + 1
        if needed <= sequence.reserved:
            return True
        most = min(len(sequence.prompt) + sequence.limit, self._plan.max_context_tokens)
        more = min(EXTENSION_TOKENS, most - sequence.reserved, self._loans.tokens_left - self._reserved)
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
        self._compute_again(sequence, [*tokens[:keep], *recent, sequence.last_token], keep)
        return True

    def _take_long_factors(self, sequence: Sequence) -> None:
        """Where LongRoPE's short factors end, compute the text again with the long ones, as transformers does."""
        cache, slot = self._runner.cache, self._slots.index(sequence)
        if not cache.needs_long_rope(slot):
            return
        tokens = cache.tokens(slot)
        if self._prefixes is not None and sequence.cache_prompt:
            self._prefixes.store(cache, slot, len(cache.prefix(slot)))
        cache.trim(slot, len(tokens))
        cache.plan(slot, len(tokens) + 1)
        self._compute_again(sequence, [*tokens, sequence.last_token], 0)

    def _compute_again(self, sequence: Sequence, tokens: list[int], done: int) -> None:
        """Send a sequence back to prefill; the first ``done`` of ``tokens`` are in its slot."""
        sequence.compute_again(tokens, done)
        self._decoding -= 1
        self._exchange(self._slots.index(sequence), self._decoding)

    def _close(
        self, sequence: Sequence, reason: FinishReason, events: list[Event], *, now: float | None = None
    ) -> None:
        events += sequence.finish(reason, self._clock() if now is None else now)
        for ended in self._all_of(sequence) if sequence.together else [sequence]:
            self._remove(ended)

    def _fail(self, sequence: Sequence, error: EngineError, events: list[Event]) -> None:
        if self._holds(sequence):
            events.append(Failed(sequence.request_id, error.reason, error.message))
        for ended in self._all_of(sequence):
            self._remove(ended, keep=False)

    def _all_of(self, sequence: Sequence) -> list[Sequence]:
        """Return all sequences of a sequence's request."""
        return [other for other in (*self._slots, *self._waiting) if other.request is sequence.request]

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
