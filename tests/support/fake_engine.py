"""A small engine for tests of the service, loaded in a real worker process in place of the real one.

A token is one character of the answer, its id the character's code. What the user says decides what happens:
``/count N`` counts to N, ``/slow`` never ends (one token a step of 10 ms), ``/crash`` kills the process at its first
step, ``/stop`` stops the process (SIGSTOP), ``/eat N`` takes N MiB of memory, ``/refuse`` is refused,
``/defect`` raises, ``/fail`` fails in the engine; anything else is answered with ``You said: …``. A file in the
package decides about loading: ``refuse-to-load``, ``hang-at-load``, ``crash-at-load``.

Run as a module it stands for ``lamplighter_agent.engine.prepare`` and does nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from lamplighter_agent.engine.events import Event, Failed, Finished, FinishReason, TextDelta, Timings, Usage
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import ContextOverflowError, IncompatiblePackageError, RequestError
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.package.manifest import Manifest, decode_manifest
from lamplighter_agent.service.worker_messages import CacheUse, Load, Prompt

ENTRY = "support.fake_engine:load"
PREPARE = "support.fake_engine"
CONTEXT_TOKENS = 4096


class _Request:
    def __init__(self, prompt: list[int], answer: list[int], params: GenerationParams, *, slow: bool) -> None:
        self.prompt_tokens = len(prompt)
        self.answer = answer
        self.params = params
        self.slow = slow
        self.sent = 0
        self.begun = time.monotonic()
        self.first: float | None = None
        self.cancelled = False


class FakeEngine:
    """Answers as the module describes."""

    def __init__(self, package: str, slots: int, manifest: Manifest | None) -> None:
        self.package = package
        self.slots = slots
        self.max_context_tokens = CONTEXT_TOKENS
        self.plan = None
        self._manifest = manifest
        self._requests: dict[str, _Request] = {}
        self._failing: list[str] = []
        self._contradicting: list[str] = []
        self.kept_bytes = 1000

    @property
    def idle(self) -> bool:
        return not self._requests and not self._failing and not self._contradicting

    def encode(self, prompt: Prompt) -> list[int]:
        if prompt.tokens is not None:
            return list(prompt.tokens)
        if prompt.messages is not None:
            return [ord(character) for character in prompt.messages[-1].content]
        assert prompt.text is not None
        return [ord(character) for character in prompt.text]

    def decode(self, tokens: list[int]) -> str:
        if max(tokens, default=0) > 0x10FFFF:
            raise RequestError("a token is outside the vocabulary", param="tokens")
        return "".join(map(chr, tokens))

    def submit(self, request_id: str, tokens: list[int], params: GenerationParams) -> None:
        if len(tokens) >= CONTEXT_TOKENS:
            raise ContextOverflowError(f"the prompt has {len(tokens)} tokens; {CONTEXT_TOKENS} fit")
        for test in self._manifest.self_tests if self._manifest else ():
            if list(test.prompt_tokens) == tokens:
                self._requests[request_id] = _Request(tokens, list(test.expected_tokens), params, slow=False)
                return
        said = "".join(map(chr, tokens))
        word, _, rest = said.partition(" ")
        if word == "/refuse":
            raise RequestError("the fake engine refuses", param="prompt")
        if word == "/defect":
            raise ZeroDivisionError("the fake engine has a defect")
        if word == "/fail":
            self._failing.append(request_id)
            return
        if word == "/contradict":
            self._contradicting.append(request_id)
            return
        if word == "/eat":
            self._eaten = bytearray(os.urandom(1024 * 1024)) * int(rest)
        if word == "/stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        answer = f"You said: {said}"
        if word == "/count":
            answer = " ".join(map(str, range(1, int(rest) + 1)))
        elif word == "/slow":
            answer = "slow " * CONTEXT_TOKENS
        elif word == "/crash":
            answer = "\0"
        self._requests[request_id] = _Request(tokens, [*map(ord, answer)], params, slow=word == "/slow")

    def submit_embedding(self, request_id: str, tokens: list[int], *, deadline_s: float | None) -> None:
        raise RequestError("the fake engine has no embeddings", param="model")

    def cancel(self, request_id: str) -> None:
        if request_id in self._requests:
            self._requests[request_id].cancelled = True

    def tend(self) -> None:
        """Nothing to look after."""

    def step(self) -> list[Event]:
        return list(self._step())

    def caches(self) -> CacheUse:
        used = sum(request.prompt_tokens + request.sent for request in self._requests.values())
        capacity = CONTEXT_TOKENS * self.slots
        return CacheUse(kv_used_tokens=used, kv_capacity_tokens=capacity, prefix_bytes=self.kept_bytes)

    def clear_caches(self) -> int:
        freed, self.kept_bytes = self.kept_bytes, 0
        return freed

    def close(self) -> None:
        self._requests.clear()

    def _step(self) -> Iterator[Event]:
        for request_id in self._failing:
            yield Failed(request_id, "engine", "the fake engine fails")
        for request_id in self._contradicting:
            yield Failed(request_id, "request", "no token is left", "ban less", 400, "banned_words")
        self._contradicting.clear()
        self._failing.clear()
        for request_id, request in list(self._requests.items())[: self.slots]:
            if reason := self._over(request):
                del self._requests[request_id]
                yield Finished(request_id, reason, "", self._usage(request), self._timings(request))
                continue
            if request.slow:
                time.sleep(0.01)
            token = request.answer[request.sent]
            if token == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            request.first = request.first or time.monotonic()
            request.sent += 1
            yield TextDelta(request_id, chr(token), (token,))

    def _over(self, request: _Request) -> FinishReason | None:
        text = "".join(map(chr, request.answer[: request.sent]))
        if request.cancelled:
            return "cancelled"
        if request.params.deadline_s is not None and time.monotonic() > request.params.deadline_s:
            return "deadline"
        if request.sent == len(request.answer) or any(stop in text for stop in request.params.stop):
            return "stop"
        if request.params.max_tokens is not None and request.sent >= request.params.max_tokens:
            return "length"
        return None

    def _usage(self, request: _Request) -> Usage:
        return Usage(prompt_tokens=request.prompt_tokens, cached_tokens=0, generated_tokens=request.sent)

    def _timings(self, request: _Request) -> Timings:
        now = time.monotonic()
        first = request.first or now
        decode = max(now - first, 1e-6)
        return Timings(
            queue_s=0.0,
            prefill_s=first - request.begun,
            first_token_s=first - request.begun,
            decode_s=decode,
            prompt_tokens_per_s=100.0,
            generated_tokens_per_s=request.sent / decode,
        )


def load(command: Load) -> FakeEngine:
    """Entry point of the worker."""
    package = Path(command.package)
    if (package / "refuse-to-load").exists():
        raise IncompatiblePackageError("the fake engine cannot load this package", hint="use another")
    if (package / "crash-at-load").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    while (package / "hang-at-load").exists():
        time.sleep(0.05)
    manifest = package / MANIFEST_NAME
    decoded = decode_manifest(manifest.read_bytes()) if manifest.exists() else None
    return FakeEngine(decoded.reference if decoded else f"{package.name}/1", command.options.slots or 2, decoded)
