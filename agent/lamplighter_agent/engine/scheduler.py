"""Continuous batching: requests join and leave while others are generated, inside the memory plan.

Each ``step`` computes at most one prefill chunk and one batched decode step, so a long prompt delays the others' next
token by one chunk, and a cancel or a deadline takes effect within a step. What the end of a prompt brings, mostly a
first token, is told before that decode step, which is then the next ``step`` alone.

Prompts get one chunk a step, in turns of the oldest and the one with the least left. A chunk is smaller while others
decode, so that it keeps their tokens waiting no longer than a bearable moment (``pace``). Rows of a batch do not mix,
and the kernels give a token of a prompt the same bits, or nearly so, in any chunk of at least two (``chunk_length``).
The kernels for one row and for several decoded together give the same bits with AVX-512 and differ in the last one
with AVX2 alone; so there a near-tie between two tokens may fall otherwise when a request is not alone. A request that
decodes alone may be given several tokens a step, where the bits are the same (``speculation``).

Every request reserves cache tokens from the plan's ``kv_tokens``: for prompt and ``max_tokens`` at its start; without
``max_tokens`` for the prompt and a block, which is extended while there is room. So the cache never exceeds the plan.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from lamplighter_agent.engine.beam_sequence import BeamSequence
from lamplighter_agent.engine.computing import Runner, prompt_logits, prompt_rows
from lamplighter_agent.engine.embedding import EmbeddingSequence
from lamplighter_agent.engine.events import Event, Failed, FinishReason
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.lending import Lender
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.overflow import Overflow
from lamplighter_agent.engine.pace import ChunkPace
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.engine.prefix_use import PrefixUse
from lamplighter_agent.engine.sampling import Scorer
from lamplighter_agent.engine.sequence import Sequence
from lamplighter_agent.engine.slots import SlotTable
from lamplighter_agent.engine.speculation import WIDTHS, Speculator, StepCosts
from lamplighter_agent.engine.truncation import Logits
from lamplighter_agent.errors import EngineError, RequestError

_RETRY_AFTER_S: Final = 2.0

_ECHO_CHUNK_TOKENS: Final = 8
"""Prompt tokens computed at once where the logits behind each are wanted: rows of a vocabulary's width are large."""


class Scheduler:
    """Drives a runner for many requests. Not thread-safe: one thread calls everything.

    Args:
        runner: Computes prefill chunks and decode steps.
        intake: Checks requests.
        plan: Slots, context and cache tokens to keep to.
        max_queued_requests: Requests that may wait for a slot.
        prefixes: Where the tokens of ended requests are kept for later ones; None: nowhere.
        speculation: Verify drafts from the text so far when one request decodes alone; changes no text.
        clock: Monotonic seconds; deadlines are on this clock.

    Attributes:
        intake: As given.
        lender: Lends slots to callers that compute in them.
    """

    def __init__(
        self,
        runner: Runner,
        intake: Intake,
        *,
        plan: MemoryPlan,
        max_queued_requests: int,
        prefixes: PrefixCache | None = None,
        speculation: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self.intake = intake
        self._plan = plan
        self._max_queued = max_queued_requests
        self._prefixes = PrefixUse(runner.cache, prefixes)
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._slots = SlotTable(runner.cache, plan)
        self._overflow = Overflow(runner.cache, self._slots, self._prefixes)
        self.lender = Lender(runner, self._slots, chunk_tokens=plan.prefill_chunk_tokens)
        self._oldest_turn = True
        self._decode_due = False
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
        loans = self._slots.loans
        if sequence.width > loans.slots_left or self.intake.first_tokens(sequence) > loans.tokens_left:
            raise RequestError("live sequences hold the slots that it needs", code=429, hint="close one first")
        if len(self._waiting) >= self._max_queued:
            raise RequestError(
                f"{len(self._waiting)} requests are already waiting", code=429, retry_after_s=_RETRY_AFTER_S
            )
        self._waiting.append(sequence)

    @property
    def used_tokens(self) -> int:
        """Cache tokens of requests and lent slots, without what ended requests left."""
        cache = self._runner.cache
        return sum(map(cache.offset, range(cache.slots))) - self._slots.left_over_tokens

    def forget(self) -> None:
        """Give back the memory of what the last request left in its slot."""
        self._slots.forget_left_over()

    def cancel(self, request_id: str) -> None:
        """End a request now; its slot is free at once and ``step`` reports it. Unknown ids have ended before."""
        while (sequence := self._find(request_id)) is not None:
            self._close(sequence, "cancelled", self._closing)

    def step(self) -> list[Event]:
        """Do a round, or half of one: end what is over, admit what fits, one prefill chunk, one decode step.

        Returns:
            What happened.
        """
        events, self._closing = self._closing, []
        now = self._clock()
        for sequence in [*self._slots.all, *self._waiting]:
            deadline_s = sequence.request.params.deadline_s
            if deadline_s is not None and now >= deadline_s and self._holds(sequence):
                self._close(sequence, "deadline", events)
        self._admit(now)
        if self._slots.prefilling and not (self._decode_due and self._slots.decoding):
            told = len(events)
            self._prefill_chunk(events)
            if len(events) > told:
                self._decode_due = True
                return events
        self._decode_due = False
        if self._slots.decoding:
            self._decode_step(events)
        return events

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in (*self._slots.all, *self._waiting):
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
            slot = self._slots.admit(sequence, self.intake.first_tokens(sequence))
            if slot is None:
                return
            self._waiting.popleft()
            sequence.request.start(now)
            # Beams step together, so that none of them can be computed again on the way.
            ahead = sequence.limit if sequence.together else 0
            self._runner.cache.plan(slot, len(sequence.prompt) + ahead)
            self._prefixes.reuse(sequence, slot)

    def _prefill_chunk(self, events: list[Event]) -> None:
        candidates = self._slots.prefilling
        if self._oldest_turn:
            sequence = min(candidates, key=lambda other: other.request.started_s)
        else:
            sequence = min(candidates, key=lambda other: other.remaining)
        self._oldest_turn = not self._oldest_turn
        try:
            logits = self._compute_chunk(sequence, self._slots.slot(sequence))
        except EngineError as error:
            self._fail(sequence, error, events)
            return
        if sequence.in_prefill:
            return
        if isinstance(sequence, EmbeddingSequence):
            self._close(sequence, "stop", events)
        else:
            rows = self._slots.begin_decoding(sequence)
            self._take(rows, [logits] * len(rows), events)

    def _compute_chunk(self, sequence: Sequence, slot: int) -> Logits:
        """Compute the next chunk of a prompt; return the logits behind its last token."""
        request = sequence.request
        if request.wants_prompt_logprobs:
            most = min(_ECHO_CHUNK_TOKENS, self._plan.prefill_chunk_tokens)
        else:
            most = self._pace.tokens(others_wait=bool(self._slots.decoding))
        tokens = sequence.remaining_prompt(most, self._runner.cache.stretch(slot))
        self._prefixes.keep_before_loss(sequence, slot, len(tokens))
        if request.wants_prompt_logprobs:
            rows = prompt_rows(self._runner.prefill_rows, self._runner.cache, slot, tokens)
            request.note_prompt_logits(rows, self.intake.vocab_size)
            logits: Logits = rows[-1]
        elif isinstance(sequence, EmbeddingSequence):
            logits = prompt_rows(self._runner.hidden_states, self._runner.cache, slot, tokens)
            sequence.add(logits)
        else:
            begun = self._clock()
            logits = prompt_logits(self._runner, slot, tokens)
            self._pace.observe(len(tokens), self._clock() - begun)
        sequence.prefilled += len(tokens)
        return logits

    def _decode_step(self, events: list[Event]) -> None:
        now = self._clock()
        for sequence in self._slots.decoding:
            if self._holds(sequence) and not self._slots.extend(sequence) and not self._overflow.slide(sequence):
                self._close(sequence, "length", events, now=now)
        for sequence in self._slots.decoding:
            self._overflow.take_long_factors(sequence)
        batch = self._slots.decoding
        if not batch:
            return
        for slot, sequence in enumerate(batch):
            self._prefixes.keep_before_loss(sequence, slot, 1)
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
        cache = self._runner.cache
        room = min(sequence.reserved - cache.offset(0), cache.room(0), cache.steady(0))
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
            except (EngineError, RequestError) as error:
                self._fail(sequence, error, events)
                continue
            events += drawn
            if reason is not None:
                self._close(sequence, reason, events, now=now)

    def _take_beams(self, leader: BeamSequence, rows: dict[Sequence, Logits], events: list[Event]) -> None:
        now, cache = self._clock(), self._runner.cache
        try:
            moves, reason = leader.take_beams(rows, now)
        except (EngineError, RequestError) as error:
            self._fail(leader, error, events)
            return
        for source, target in moves:
            slot = self._slots.slot(source)
            cache.copy(slot, self._slots.slot(target), cache.offset(slot), start=len(leader.prompt))
        if reason is not None:
            self._close(leader, reason, events, now=now)

    def _close(
        self, sequence: Sequence, reason: FinishReason, events: list[Event], *, now: float | None = None
    ) -> None:
        events += sequence.finish(reason, self._clock() if now is None else now)
        for ended in self._all_of(sequence) if sequence.together else [sequence]:
            self._remove(ended)

    def _fail(self, sequence: Sequence, error: EngineError | RequestError, events: list[Event]) -> None:
        if self._holds(sequence):
            code, param = (error.code, error.param) if isinstance(error, RequestError) else (None, None)
            events.append(Failed(sequence.request_id, error.reason, error.message, error.hint, code, param))
        for ended in self._all_of(sequence):
            self._remove(ended, keep=False)

    def _all_of(self, sequence: Sequence) -> list[Sequence]:
        """Return all sequences of a sequence's request."""
        return [other for other in (*self._slots.all, *self._waiting) if other.request is sequence.request]

    def _remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a request out of the queue or its slot; its tokens are kept unless a failure makes them doubtful."""
        if sequence not in self._slots:
            self._waiting.remove(sequence)
            return
        kept = keep and self._prefixes.keep(sequence, self._slots.slot(sequence))
        if sequence.speculator is not None:
            self._runner.cache.unmap_mirrors()
        self._slots.remove(sequence, leave=kept)
