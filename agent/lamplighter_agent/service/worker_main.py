"""The engine worker: a child process that loads one package and generates what the agent asks for.

The agent passes one end of a socketpair by number. The loop drains commands without waiting while the engine has work
and waits when it has none, so that a cancel takes effect within one step. The process ends on ``Shutdown``, on SIGTERM
and when the other end of the socketpair is gone, which is how it learns of its parent's death.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lamplighter_agent.engine.events import Event as EngineEvent
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import EngineError, LamplighterError
from lamplighter_agent.service.worker_messages import (
    COMMANDS,
    HEADER_BYTES,
    Alive,
    AskStats,
    CacheUse,
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
    failure_of,
    frame_length,
)

logger = logging.getLogger(__name__)

DEFAULT_ENGINE = "lamplighter_agent.service.worker_engine:load"
_ALIVE_INTERVAL_S = 1.0
_IDLE_TICK_S = 5.0
_READ_BYTES = 64 * 1024


class ServedEngine(Protocol):
    """What the worker needs of an engine; tests give it a small one.

    Attributes:
        package: ``name/version``.
        slots: Requests generated at once.
        max_context_tokens: Prompt and generated tokens of one request together.
        plan: Its memory plan, or None.
    """

    package: str
    slots: int
    max_context_tokens: int
    plan: MemoryPlan | None

    @property
    def idle(self) -> bool:
        """True when ``step`` has nothing to do."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""

    def submit(self, request_id: str, tokens: list[int], params: GenerationParams) -> None:
        """Accept a request."""

    def submit_embedding(self, request_id: str, tokens: list[int], *, deadline_s: float | None) -> None:
        """Accept a text whose embedding is wanted."""

    def cancel(self, request_id: str) -> None:
        """End a request early."""

    def step(self) -> list[EngineEvent]:
        """Do one step's work and return what came of it."""

    def tend(self) -> None:
        """Look after what is not a request's: called between steps and, now and then, while there is no work."""

    def caches(self) -> CacheUse:
        """Return what the caches hold."""

    def clear_caches(self) -> int:
        """Forget what is kept for later requests; return how many bytes that was."""

    def close(self) -> None:
        """Give everything back."""


class WorkerProcess:
    """The loop of the child.

    Args:
        channel: The socket to the agent.
        load: Makes the engine from the first command.
    """

    def __init__(self, channel: socket.socket, load: Callable[[Load], ServedEngine]) -> None:
        self._channel = channel
        self._load = load
        self._received = bytearray()
        self._last_sent = time.monotonic()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._stop = False

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            engine = self._start()
            if engine is None:
                return EngineError.exit_code
            try:
                self._serve(engine)
            finally:
                engine.close()
        except (BrokenPipeError, ConnectionResetError):
            logger.warning("the agent is gone; the worker ends")
        return 0

    def _start(self) -> ServedEngine | None:
        command = None
        while command is None and not self._stop:
            command = next(iter(self._receive(wait=True)), None)
        if not isinstance(command, Load):
            return None
        begun = time.monotonic()
        try:
            engine = self._load(command)
        except LamplighterError as error:
            self._send(LoadFailed(failure=failure_of(error)))
            return None
        except Exception as error:  # the process boundary: the agent must learn why
            logger.exception("the engine cannot be loaded")
            wrapped = EngineError(f"loading {command.package} failed: {type(error).__name__}: {error}")
            self._send(LoadFailed(failure=failure_of(wrapped)))
            return None
        self._send(
            Ready(
                package=engine.package,
                load_s=time.monotonic() - begun,
                slots=engine.slots,
                max_context_tokens=engine.max_context_tokens,
                plan=engine.plan,
                rss_bytes=_memory("VmRSS"),
            )
        )
        return engine

    def _serve(self, engine: ServedEngine) -> None:
        while not self._stop:
            for command in self._receive(wait=engine.idle):
                if isinstance(command, Shutdown):
                    return
                self._handle(engine, command)
            if engine.idle:
                engine.tend()
            else:
                for event in engine.step():
                    self._send(event)
                if time.monotonic() - self._last_sent >= _ALIVE_INTERVAL_S:
                    self._send(Alive())

    def _handle(self, engine: ServedEngine, command: Command) -> None:
        match command:
            case Generate(request_id=request_id, prompt=prompt, params=params, embed=True):
                self._try(
                    request_id,
                    lambda: engine.submit_embedding(request_id, engine.encode(prompt), deadline_s=params.deadline_s),
                )
            case Generate(request_id=request_id, prompt=prompt, params=params):
                self._try(request_id, lambda: engine.submit(request_id, engine.encode(prompt), params))
            case Cancel(request_id=request_id):
                engine.cancel(request_id)
            case Tokenize(request_id=request_id, prompt=prompt):
                self._try(
                    request_id,
                    lambda: self._send(Tokens(request_id=request_id, tokens=tuple(engine.encode(prompt)))),
                )
            case Detokenize(request_id=request_id, tokens=tokens):
                self._try(
                    request_id,
                    lambda: self._send(Text(request_id=request_id, text=engine.decode(list(tokens)))),
                )
            case AskStats(request_id=request_id):
                self._tell_stats(engine, request_id)
            case ClearCaches(request_id=request_id):
                self._tell_stats(engine, request_id, freed_bytes=engine.clear_caches())
            case Ping():
                self._send(Alive())
            case _:
                logger.error("unexpected command %s", type(command).__name__)

    def _tell_stats(self, engine: ServedEngine, request_id: str, freed_bytes: int = 0) -> None:
        self._send(
            Stats(
                request_id=request_id,
                rss_bytes=_memory("VmRSS"),
                peak_rss_bytes=_memory("VmHWM"),
                caches=engine.caches(),
                freed_bytes=freed_bytes,
            )
        )

    def _try(self, request_id: str, action: Callable[[], None]) -> None:
        try:
            action()
        except LamplighterError as error:
            self._send(Refused(request_id=request_id, failure=failure_of(error)))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # what one request brings must not end the answers of the others
            logger.exception("request %s cannot be taken", request_id)
            wrapped = EngineError(f"the request cannot be taken: {type(error).__name__}")
            self._send(Refused(request_id=request_id, failure=failure_of(wrapped)))

    def _receive(self, *, wait: bool) -> list[Command]:
        """Return the commands that have arrived, waiting for input first if asked; sets ``_stop`` at the end."""
        commands: list[Command] = []
        readable, _, _ = select.select([self._channel, self._wake_read], [], [], _IDLE_TICK_S if wait else 0)
        if self._wake_read in readable:
            self._wake_read.recv(_READ_BYTES)
        if self._channel in readable:
            data = self._channel.recv(_READ_BYTES)
            if not data:
                self._stop = True
                return []
            self._received += data
        while len(self._received) >= HEADER_BYTES:
            end = HEADER_BYTES + frame_length(bytes(self._received[:HEADER_BYTES]))
            if len(self._received) < end:
                break
            commands.append(decode_body(COMMANDS, bytes(self._received[HEADER_BYTES:end])))
            del self._received[:end]
        return commands

    def _send(self, event: Event) -> None:
        self._channel.sendall(encode_frame(event))
        self._last_sent = time.monotonic()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stop = True


def _memory(field: str) -> int:
    """Return a size of this process in bytes from ``/proc/self/status`` (``VmRSS`` or ``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the worker on an inherited socket."""
    parser = argparse.ArgumentParser(prog="lamplighter-worker")
    parser.add_argument("--fd", type=int, required=True, help="number of the inherited socket")
    parser.add_argument("--engine", default=DEFAULT_ENGINE, help="module:function that loads the engine")
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(levelname)s worker: %(name)s: %(message)s")
    module, _, function = options.engine.partition(":")
    load = vars(importlib.import_module(module))[function]
    return WorkerProcess(socket.socket(fileno=options.fd), load).run()


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # native threads of the runtime must not hold the process up
