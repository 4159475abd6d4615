"""The real engine as the worker process drives it. Imported only in the child: it brings onnxruntime with it."""

from __future__ import annotations

from pathlib import Path

from lamplighter_agent.engine.events import Event
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.worker_messages import CacheUse, Load, Prompt


class PackageEngine:
    """A loaded package behind the worker's ``ServedEngine``.

    Args:
        engine: The engine, which this object closes.

    Attributes:
        package: ``name/version``.
        slots: Requests generated at once.
        max_context_tokens: Prompt and generated tokens of one request together.
        plan: The memory plan that it keeps to.
    """

    def __init__(self, engine: Engine) -> None:
        self.package = engine.manifest.reference
        self.slots = engine.plan.slots
        self.max_context_tokens = engine.plan.max_context_tokens
        self.plan: MemoryPlan | None = engine.plan
        self._engine = engine

    @property
    def idle(self) -> bool:
        """True when ``step`` has nothing to do."""
        return self._engine.scheduler.idle

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens; words of a user go through the chat format where the package has one.

        Raises:
            RequestError: If the messages do not suit the chat format.
        """
        if prompt.tokens is not None:
            return self._engine.encode_prompt(list(prompt.tokens))
        if prompt.messages is not None:
            return self._engine.encode_prompt(list(prompt.messages))
        text = prompt.text or ""
        if prompt.raw or self._engine.manifest.chat_format is None:
            return self._engine.encode_prompt(text)
        return self._engine.encode_prompt([ChatMessage("user", text)])

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, special ones left out.

        Raises:
            RequestError: If one is outside the vocabulary.
        """
        size = self._engine.tokenizer.vocab_size
        foreign = next((token_id for token_id in tokens if not 0 <= token_id < size), None)
        if foreign is not None:
            raise RequestError(f"token {foreign} is outside the vocabulary of {size}", param="tokens")
        return self._engine.tokenizer.decode(tokens)

    def submit(self, request_id: str, tokens: list[int], params: GenerationParams) -> None:
        """Accept a request.

        Raises:
            RequestError: If it cannot be served.
        """
        self._engine.guard.admit()
        self._engine.scheduler.submit(request_id, tokens, params)

    def submit_embedding(self, request_id: str, tokens: list[int], *, deadline_s: float | None) -> None:
        """Accept a text whose embedding is wanted.

        Raises:
            RequestError: If it cannot be served.
        """
        self._engine.scheduler.submit_embedding(request_id, tokens, deadline_s=deadline_s)

    def cancel(self, request_id: str) -> None:
        """End a request early."""
        self._engine.scheduler.cancel(request_id)

    def step(self) -> list[Event]:
        """Do one step's work and return what came of it."""
        self.tend()
        return self._engine.scheduler.step()

    def tend(self) -> None:
        """Give memory up if the machine is short of it."""
        self._engine.guard.tend()

    def caches(self) -> CacheUse:
        """Return what the caches hold."""
        cache = self._engine.runner.cache
        return CacheUse(
            kv_used_tokens=self._engine.scheduler.used_tokens,
            kv_capacity_tokens=cache.capacity * self.slots,
            prefix_bytes=self._engine.prefixes.nbytes,
        )

    def clear_caches(self) -> int:
        """Forget the prefixes of earlier prompts, also those on the disk; return the bytes of memory freed."""
        freed_bytes = self._engine.prefixes.nbytes
        self._engine.forget_prefixes()
        return freed_bytes

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


def load(command: Load) -> PackageEngine:
    """Load a package; the worker's default entry point.

    Raises:
        PackageError: If the package cannot be read or run here.
        EngineError: If the runtime fails or memory is too small.
    """
    prepared_root = Path(command.prepared_root) if command.prepared_root else None
    prefix_root = Path(command.prefix_root) if command.prefix_root else None
    return PackageEngine(
        Engine.load(
            Path(command.package), options=command.options, prepared_root=prepared_root, prefix_root=prefix_root
        )
    )
