"""The agent's end of an engine worker: one object, one child process, from its start to its end.

The worker is a process because onnxruntime gives memory back only when its process ends, and because running out of
memory must end the engine and not the agent. This side never imports onnxruntime.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from lamplighter_agent.engine.events import Failed, Finished, TextDelta
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError, WorkerError
from lamplighter_agent.service.worker_messages import (
    EVENTS,
    HEADER_BYTES,
    Alive,
    AskStats,
    Cancel,
    ClearCaches,
    Command,
    Detokenize,
    Event,
    Generate,
    Load,
    LoadFailed,
    Ping,
    Prompt,
    Ready,
    Refused,
    Shutdown,
    Stats,
    Text,
    Tokenize,
    Tokens,
    decode_body,
    encode_frame,
    error_of,
    failure_of,
    failure_of_event,
    frame_length,
)
from lamplighter_agent.service.worker_process import start_process, why_ended

logger = logging.getLogger(__name__)

DEFAULT_ENGINE: Final = "lamplighter_agent.service.worker_engine:load"
_ANSWER_TIMEOUT_S: Final = 30.0
_KILL_WAIT_S: Final = 5.0
_STALL_CHECKS: Final = 4

WorkerState = Literal["new", "starting", "ready", "stopping", "ended"]
_Answer = TextDelta | Finished | Failed | Refused | Tokens | Text | Stats
_T = TypeVar("_T", Tokens, Text, Stats)
_Stream = asyncio.Queue[_Answer]


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and how.

    Attributes:
        package: Package directory.
        prepared_root: Where weights prepared for this CPU lie, or None.
        prefix_root: Where prefixes are kept over a restart, or None.
        options: Limits and choices for the engine.
        engine: ``module:function`` that loads the engine in the child.
        start_timeout_s: Longest time from start to readiness.
        stall_timeout_s: Longest silence after it was asked for something, be it a sign of life.
        log_level: Level of the child's log, as the logging module counts.
    """

    package: Path
    prepared_root: Path | None = None
    prefix_root: Path | None = None
    options: EngineOptions = EngineOptions()
    engine: str = DEFAULT_ENGINE
    start_timeout_s: float = 300.0
    stall_timeout_s: float = 120.0
    log_level: int = logging.INFO


class EngineWorker:
    """A worker process. It is started once and ends once; a restart is a new object.

    Args:
        spec: What to run.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.state: WorkerState = "new"
        self.ready: Ready | None = None
        self.ended = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[str, _Stream] = {}
        self._closing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._numbers = itertools.count(1)
        self._owes_since_s: float | None = None
        self.end_reason = "it was not started"
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """Process id, or None before the start and after the end."""
        return self._process.pid if self._process and not self.ended.is_set() else None

    @property
    def silent_s(self) -> float:
        """How long the worker has owed an answer or a sign of life; 0 while it owes none."""
        return 0.0 if self._owes_since_s is None or self.ended.is_set() else time.monotonic() - self._owes_since_s

    @property
    def active(self) -> int:
        """Requests and questions under way."""
        return len(self._streams)

    async def start(self) -> Ready:
        """Start the process and wait until its package is loaded.

        Raises:
            WorkerError: If it ended or was not ready in time.
            PackageError: If the package cannot be used here.
            EngineError: If it cannot be loaded, for example for lack of memory.
        """
        self.state = "starting"
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                event = await self._spawn()
        except TimeoutError as error:
            await self._end(f"it was not ready within {self.spec.start_timeout_s:g} s")
            raise WorkerError(
                f"the engine worker for {self.spec.package} was not ready within {self.spec.start_timeout_s:g} s"
            ) from error
        except BaseException:
            await self._end("its start was given up")
            raise
        if isinstance(event, LoadFailed):
            await self._end(event.failure.message)
            raise error_of(event.failure)
        self._owes_since_s = None
        self.ready = event
        self.state = "ready"
        self._tasks.append(asyncio.create_task(self._watch(), name="worker-watch"))
        logger.info("worker %s is ready with %s after %.1f s", self.pid, event.package, event.load_s)
        return event

    async def generate(
        self, request_id: str, prompt: Prompt, params: GenerationParams, *, embed: bool = False
    ) -> AsyncGenerator[TextDelta | Finished, None]:
        """Run a request; the last event is ``Finished``. Closing the iterator early cancels the request.

        Events are queued here until they are taken; a request's ``max_tokens`` bounds how many there can be.

        Raises:
            RequestError: If the engine refuses the request.
            EngineError: If the engine cannot serve it.
            WorkerError: If the worker ends meanwhile; a retry may succeed.
        """
        stream = self._open(request_id)
        finished = False
        try:
            await self._send(Generate(request_id=request_id, prompt=prompt, params=params, embed=embed))
            while not finished:
                event = await stream.get()
                if isinstance(event, Refused):
                    finished = True
                    raise error_of(event.failure)
                if isinstance(event, Failed):
                    finished = True
                    raise error_of(failure_of_event(event))
                if isinstance(event, TextDelta | Finished):
                    finished = isinstance(event, Finished)
                    yield event
        finally:
            self._forget(request_id)
            if not finished:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Ask the engine to end a request; its iterator then gets ``Finished`` with ``cancelled``."""
        if self._writer is not None and not self.ended.is_set():
            self._writer.write(encode_frame(Cancel(request_id=request_id)))

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's tokens.

        Raises:
            RequestError: If the prompt cannot be rendered.
            WorkerError: If the worker ends or does not answer in time.
        """
        number = f"tokenize-{next(self._numbers)}"
        return (await self._ask_for(Tokens, Tokenize(request_id=number, prompt=prompt))).tokens

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        """Return the text of tokens, special ones left out.

        Raises:
            RequestError: If one is outside the vocabulary.
            WorkerError: If the worker ends or does not answer in time.
        """
        number = f"detokenize-{next(self._numbers)}"
        return (await self._ask_for(Text, Detokenize(request_id=number, tokens=tokens))).text

    async def stats(self) -> Stats:
        """Return the worker's memory use.

        Raises:
            WorkerError: If the worker ends or does not answer in time.
        """
        return await self._ask_for(Stats, AskStats(request_id=f"stats-{next(self._numbers)}"))

    async def clear_caches(self) -> Stats:
        """Forget the prefixes of earlier prompts; return the worker's state afterwards.

        Raises:
            WorkerError: If the worker ends or does not answer in time.
        """
        return await self._ask_for(Stats, ClearCaches(request_id=f"clear-{next(self._numbers)}"))

    async def stop(self, grace_s: float = 10.0) -> None:
        """End the process: let requests under way finish for ``grace_s``, then ask it to end, then kill it."""
        if self.state == "ready":
            self.state = "stopping"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), grace_s)
            if self._writer is not None and not self.ended.is_set():
                self._writer.write(encode_frame(Shutdown()))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), _KILL_WAIT_S)
        await self._end("it was stopped")

    async def _spawn(self) -> Ready | LoadFailed:
        ours, theirs = socket.socketpair()
        try:
            self._process = await start_process(self.spec.engine, self.spec.log_level, theirs.fileno())
        except OSError as error:
            ours.close()
            raise WorkerError(f"the engine worker cannot be started: {error}") from error
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        prepared, prefixes = self.spec.prepared_root, self.spec.prefix_root
        await self._send(
            Load(
                package=str(self.spec.package),
                prepared_root=str(prepared) if prepared else None,
                prefix_root=str(prefixes) if prefixes else None,
                options=self.spec.options,
            )
        )
        try:
            event = await _read(reader)
        except EOFError as error:
            status = await self._process.wait()
            raise WorkerError(
                f"the engine worker ended while it loaded {self.spec.package}: {why_ended(status)}"
            ) from error
        if not isinstance(event, Ready | LoadFailed):
            raise WorkerError(f"the engine worker began with {type(event).__name__}")
        self._tasks.append(asyncio.create_task(self._read_events(reader), name="worker-read"))
        return event

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                event = await _read(reader)
                self._owes_since_s = None
                if isinstance(event, Alive | Ready | LoadFailed):
                    continue
                stream = self._streams.get(event.request_id)
                if stream is not None:  # otherwise its asker has left
                    stream.put_nowait(event)
        except (EOFError, ConnectionError):
            await self._close("its channel was closed")
        except WorkerError as error:
            await self._close(error.message)

    async def _watch(self) -> None:
        """Ask for signs of life, with work and without; end a worker that gives none: something stopped it."""
        while not self.ended.is_set():
            await asyncio.sleep(self.spec.stall_timeout_s / _STALL_CHECKS)
            if self.silent_s > self.spec.stall_timeout_s:
                await self._close(f"it gave no sign of life for {self.spec.stall_timeout_s:g} s")
            else:
                # Not waited for: a stopped worker does not empty the channel, and who would find that out then?
                self._write(Ping())

    async def _close(self, reason: str) -> None:
        """Make sure that the process is gone, and tell everyone who waits for it."""
        if self._closing or self._process is None:
            return
        self._closing = True
        if self._writer is not None:
            self._writer.close()
        try:
            status = await asyncio.wait_for(self._process.wait(), 0.5)
            reason = f"{reason}: {why_ended(status)}"
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self.end_reason = reason
        if self.state != "stopping":
            logger.warning("worker %s ended: %s", self._process.pid, reason)
        self.state = "ended"
        self.ended.set()
        lost = WorkerError(f"the engine worker was lost: {reason}", hint="send the request again")
        for request_id, stream in self._streams.items():
            stream.put_nowait(Refused(request_id=request_id, failure=failure_of(lost)))

    async def _end(self, reason: str) -> None:
        """Close and wait for the object's own tasks."""
        if self.state == "starting":
            self.state = "stopping"
        await self._close(reason)
        if self._process is not None:
            await self.ended.wait()
        self.state = "ended"
        self.ended.set()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._tasks.clear()

    async def _ask_for(self, kind: type[_T], command: Tokenize | Detokenize | AskStats | ClearCaches) -> _T:
        stream = self._open(command.request_id)
        try:
            await self._send(command)
            event = await asyncio.wait_for(stream.get(), _ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            raise WorkerError(f"the engine worker did not answer within {_ANSWER_TIMEOUT_S:g} s") from error
        finally:
            self._forget(command.request_id)
        if isinstance(event, Refused):
            raise error_of(event.failure)
        if not isinstance(event, kind):
            raise WorkerError(f"the engine worker answered {type(command).__name__} with {type(event).__name__}")
        return event

    def _open(self, request_id: str) -> _Stream:
        if self.state != "ready":
            raise WorkerError(f"the engine worker is not ready: {self.end_reason}", hint="try again in a moment")
        if request_id in self._streams:
            raise RequestError(f"a request {request_id!r} is already running", code=409, param="id")
        stream: _Stream = asyncio.Queue()
        self._streams[request_id] = stream
        self._drained.clear()
        return stream

    def _forget(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._drained.set()

    def _write(self, command: Command) -> None:
        assert self._writer is not None
        frame = encode_frame(command)
        if self._owes_since_s is None:
            self._owes_since_s = time.monotonic()
        self._writer.write(frame)

    async def _send(self, command: Command) -> None:
        assert self._writer is not None
        self._write(command)
        try:
            await self._writer.drain()
        except ConnectionError:
            return  # the reading side sees the same end and tells everyone why


async def _read(reader: asyncio.StreamReader) -> Event:
    """Return the next event.

    Raises:
        EOFError: If the channel ended (``asyncio.IncompleteReadError`` is one).
        WorkerError: If the channel is damaged.
    """
    length = frame_length(await reader.readexactly(HEADER_BYTES))
    return decode_body(EVENTS, await reader.readexactly(length))
