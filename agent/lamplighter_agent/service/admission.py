"""Between the transports and the worker: who may wait, who is next, what is known already, what came of it.

A transport hands in a ``GenerationRequest`` and reads a ``Ticket``: pieces of text, then the ``Answer``, or an error.
It knows nothing of workers; this module knows nothing of topics or HTTP. Everything runs in the agent's event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections import OrderedDict, deque
from typing import Final

import msgspec

from lamplighter_agent.config import RequestsConfig
from lamplighter_agent.engine.events import Finished
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import EngineError, LamplighterError, RequestError
from lamplighter_agent.service.answers import Answer, Parts
from lamplighter_agent.service.counters import Counters
from lamplighter_agent.service.ticket import GenerationRequest, Ticket
from lamplighter_agent.service.token_bucket import TokenBuckets
from lamplighter_agent.service.worker import EngineWorker

logger = logging.getLogger(__name__)

DEFAULT_MODEL: Final = "default"
MAX_REMEMBERED: Final = 4096
MAX_HELD_TOKENS: Final = 131_072
_RETRY_AFTER_S: Final = 2.0
_MOST_RETRY_AFTER_S: Final = 60.0
_SMOOTHING: Final = 0.2


class RequestQueue:
    """Bounded queue in front of the engine.

    Args:
        config: Sizes and defaults.
    """

    def __init__(self, config: RequestsConfig) -> None:
        self._config = config
        self._waiting: deque[Ticket] = deque()
        self._timers: dict[Ticket, asyncio.TimerHandle] = {}
        self._running: dict[Ticket, asyncio.Task[None]] = {}
        self._remembered: OrderedDict[tuple[str, str], tuple[bytes, float]] = OrderedDict()
        self._numbers = itertools.count(1)
        self._worker: EngineWorker | None = None
        self._refusal: RequestError | None = None
        self._closed = False
        self._buckets = TokenBuckets(config.rate_per_s, config.burst)
        self._mean_s = 0.0
        self.counters = Counters()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def worker(self) -> EngineWorker | None:
        """The worker that takes new requests, or None."""
        return self._worker

    def attach(self, worker: EngineWorker) -> None:
        """Send requests to ``worker`` from now on; those that another one is answering stay there."""
        if self._closed:
            return
        self._worker = worker
        self._refusal = None
        self._start_next()

    def detach(self, refusal: RequestError | None = None) -> None:
        """Send requests to nobody: they wait, or with ``refusal`` they are refused, the waiting ones too."""
        if self._closed:
            return
        self._worker = None
        self._refusal = refusal
        if refusal is not None:
            while self._waiting:
                self._give_up(self._waiting[0], refusal)

    def close(self, refusal: RequestError) -> None:
        """Refuse everything from now on, whatever is attached later; what is being answered goes on."""
        self.detach(refusal)
        self._closed = True

    def submit(self, request: GenerationRequest) -> Ticket | None:
        """Accept a request, or return None for one that was accepted before.

        Raises:
            RequestError: 400 for bad options, 404 for another model, 409 for a known id with another body, 429 when
                too many wait, 503 when there is nothing to answer it.
        """
        try:
            if self._refusal is not None:
                raise self._refusal
            request.params.validate()
            self.check_model(request.model)
            if request.idempotent and self._is_known(request):
                return None
            if not request.is_part:
                self._check_rate(request.client or request.sender)
            free = self._worker is not None and not self._waiting and self._has_slot(self._worker)
            if not free and len(self._waiting) >= self._config.queue_size:
                raise RequestError(
                    f"{len(self._waiting)} requests are waiting already",
                    code=429,
                    retry_after_s=self._retry_after_s(),
                    hint="try again later, or ask another box of the group",
                )
        except RequestError:
            self.counters.refused += 1
            raise
        self.counters.accepted += 1
        ticket = Ticket(request, str(next(self._numbers)), self.cancel_ticket)
        deadline_s = self._deadline_s(request)
        if request.idempotent:
            self._remember(request, ticket.arrived_s + deadline_s)
        self._waiting.append(ticket)
        self._timers[ticket] = asyncio.get_running_loop().call_later(deadline_s, self._expire, ticket)
        self._start_next()
        return ticket

    def cancel(self, request_id: str, sender: str | None = None) -> int:
        """Cancel the requests of that id, of one sender or of all; returns how many there were."""
        found = [
            ticket
            for ticket in (*self._waiting, *self._running)
            if ticket.request.id == request_id and sender in {None, ticket.request.sender}
        ]
        for ticket in found:
            self.cancel_ticket(ticket)
        return len(found)

    def cancel_ticket(self, ticket: Ticket) -> None:
        """Cancel one request; without effect once it is over."""
        ticket.cancelled = True
        if ticket in self._running:
            if ticket.worker is not None:
                ticket.worker.cancel(ticket.number)
        elif ticket in self._timers:
            self._give_up(ticket, _cancelled())

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing is being answered, for at most ``timeout_s``; then cancel what is left."""
        running = list(self._running.values())
        if not running:
            return
        _, left = await asyncio.wait(running, timeout=timeout_s)
        for ticket in list(self._running):
            self.cancel_ticket(ticket)
        if left:
            logger.warning("%d requests were cut off", len(left))
            await asyncio.wait(left, timeout=timeout_s)

    def _start_next(self) -> None:
        worker = self._worker
        while worker is not None and self._waiting and self._has_slot(worker):
            ticket = self._waiting.popleft()
            self._timers.pop(ticket).cancel()
            ticket.worker = worker
            task = asyncio.create_task(self._run(ticket, worker), name=f"request-{ticket.number}")
            self._running[ticket] = task
            task.add_done_callback(lambda _task, ticket=ticket: self._finish(ticket))  # type: ignore[misc]

    def _finish(self, ticket: Ticket) -> None:
        del self._running[ticket]
        self._start_next()

    def _has_slot(self, worker: EngineWorker) -> bool:
        if worker.ready is None or worker.state != "ready":
            return False
        return sum(ticket.worker is worker for ticket in self._running) < worker.ready.slots

    async def _run(self, ticket: Ticket, worker: EngineWorker) -> None:
        request = ticket.request
        waited_s = time.monotonic() - ticket.arrived_s
        params = msgspec.structs.replace(
            request.params,
            max_tokens=min(request.params.max_tokens or self._config.max_tokens, most_tokens(request.params)),
            deadline_s=ticket.arrived_s + self._deadline_s(request),
        )
        parts = Parts()
        try:
            if ticket.cancelled:  # since its start was decided: the worker does not know it yet
                raise _cancelled()
            begun_s = time.monotonic()
            async for event in worker.generate(ticket.number, request.prompt, params, embed=request.embed):
                if isinstance(event, Finished):
                    self._mean_s += _SMOOTHING * (time.monotonic() - begun_s - self._mean_s)
                    ticket.put(self._answer(event, parts, waited_s, worker))
                else:
                    parts.add(event)
                    ticket.put(event)
        except LamplighterError as error:
            self.counters.failed += 1
            ticket.put(error)
        except Exception as error:  # a request's task is a boundary: its asker must get an answer
            logger.exception("request %s failed", request.id)
            self.counters.failed += 1
            ticket.put(EngineError(f"the request failed in the agent: {type(error).__name__}"))

    def _answer(self, event: Finished, parts: Parts, waited_s: float, worker: EngineWorker) -> Answer:
        timings = msgspec.structs.replace(
            event.timings,
            queue_s=event.timings.queue_s + waited_s,
            first_token_s=event.timings.first_token_s + waited_s,
        )
        self.counters.note(event.usage, timings)
        return Answer(
            alternatives=parts.alternatives(event),
            embedding=event.embedding,
            usage=event.usage,
            timings=timings,
            package=worker.ready.package if worker.ready else "",
        )

    def _expire(self, ticket: Ticket) -> None:
        waited = self._deadline_s(ticket.request)
        self._give_up(ticket, RequestError(f"the request waited for its whole {waited:g} s", code=408))

    def _give_up(self, ticket: Ticket, error: RequestError) -> None:
        self._waiting.remove(ticket)
        self._timers.pop(ticket).cancel()
        self.counters.failed += 1
        ticket.put(error)

    def _deadline_s(self, request: GenerationRequest) -> float:
        return request.deadline_s or self._config.default_deadline_s

    def _check_rate(self, client: str) -> None:
        wait_s = self._buckets.take(client, time.monotonic())
        if wait_s > 0.0:
            raise RequestError(
                f"one client may send {self._config.rate_per_s:g} requests a second and {self._config.burst} at once",
                code=429,
                retry_after_s=wait_s,
                hint="send fewer, or raise requests.rate_per_s",
            )

    def _retry_after_s(self) -> float:
        """Return when a place in the queue should be free, by how long answers took lately."""
        slots = self._worker.ready.slots if self._worker is not None and self._worker.ready is not None else 1
        return min(_MOST_RETRY_AFTER_S, max(_RETRY_AFTER_S, self._mean_s / slots))

    def check_model(self, model: str | None) -> None:
        """Check that the package in use is the one that is asked for.

        Raises:
            RequestError: 404 if it is another one.
        """
        if self._worker is None or self._worker.ready is None or model in {None, DEFAULT_MODEL}:
            return
        package = self._worker.ready.package
        if model not in {package, package.partition("/")[0]}:
            raise RequestError(
                f"this box runs {package}, not {model!r}",
                code=404,
                param="model",
                hint=f"leave 'model' out or set it to {package.partition('/')[0]!r}",
            )

    def _is_known(self, request: GenerationRequest) -> bool:
        known = self._remembered.get((request.sender, request.id))
        if known is None or known[1] < time.monotonic():
            return False
        if known[0] != _digest(request):
            raise RequestError(
                f"the id {request.id!r} was used for another request",
                code=409,
                param="id",
                hint="give every request an id of its own",
            )
        return True

    def _remember(self, request: GenerationRequest, until_s: float) -> None:
        key = (request.sender, request.id)
        self._remembered.pop(key, None)
        self._remembered[key] = (_digest(request), until_s)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)


def most_tokens(params: GenerationParams) -> int:
    """Return the most tokens of one answer: until its end all of them are held, and what is told about each."""
    told = 1 if params.logprobs is None else 2 + params.logprobs
    return MAX_HELD_TOKENS // (params.n * told)


def _cancelled() -> RequestError:
    return RequestError("the request was cancelled while it waited", code=499)


def _digest(request: GenerationRequest) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(request)).digest()
