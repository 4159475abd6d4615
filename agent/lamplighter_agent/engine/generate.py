"""The engine as a library: load a package, then iterate over tokens.

    engine = Engine.load(Path("packages/smollm2/1.0"))
    for token in engine.generate("Why is the sky blue?", GenerationParams(max_tokens=100)):
        print(token.text, end="")

Ceasing to iterate stops the generation. The worker process drives ``engine.scheduler`` instead.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.events import Event, Failed, Finished
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.live import LiveSequence
from lamplighter_agent.engine.loading import OpenedPackage, make_cache, open_package, open_prefix_files
from lamplighter_agent.engine.options import MIN_CONTEXT_TOKENS, EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.pinned import pinned_tokens, warm
from lamplighter_agent.engine.prefix_cache import PrefixCache
from lamplighter_agent.engine.prefix_files import PrefixFiles
from lamplighter_agent.engine.pressure import MemoryGuard
from lamplighter_agent.engine.prompts import Messages, Prompt, read_messages, read_prompt
from lamplighter_agent.engine.runner import ModelRunner
from lamplighter_agent.engine.sampling import Scorer
from lamplighter_agent.engine.scheduler import Scheduler
from lamplighter_agent.engine.tokens import Generation, Token
from lamplighter_agent.errors import ConfigError, EngineError, RequestError
from lamplighter_agent.heap import trim_heap
from lamplighter_agent.package.chat_format import ChatFormat, ChatMessage

logger = logging.getLogger(__name__)


class Engine:
    """A loaded package. Use ``Engine.load``, also in a ``with`` statement.

    Threads may share it: what they ask for at the same time is computed together, one step at a time. A generation and
    a live sequence belong to one thread each.

    Attributes:
        manifest: The package's manifest.
        tokenizer: Its tokenizer.
        plan: The memory plan that the engine keeps to.
        scheduler: Serves many requests at once.
        runner: The model and its cache.
        prefixes: The prefix cache.
        guard: Gives memory up under pressure.
        prepared: True if the weights come from a prepared copy.
        threads: Compute threads.
    """

    def __init__(
        self,
        opened: OpenedPackage,
        options: EngineOptions,
        *,
        prefix_files: PrefixFiles | None = None,
    ) -> None:
        manifest, tokenizer, plan = opened.manifest, opened.tokenizer, opened.plan
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.session = opened.session
        self.plan = plan
        self.threads = opened.threads
        self.prepared = opened.prepared
        cache = make_cache(manifest, plan)
        self._prefix_files = prefix_files if plan.prefix_cache_bytes else None
        source = None if self._prefix_files is None else self._prefix_files.recall
        self.prefixes = PrefixCache(cache.spec, max_bytes=plan.prefix_cache_bytes, source=source)
        self.runner = ModelRunner(opened.session, cache, opened.prompts)
        vocab_size = min(manifest.model.vocab_size, tokenizer.vocab_size)
        self.scheduler = Scheduler(
            self.runner,
            Intake(tokenizer, defaults=manifest.generation, plan=plan, vocab_size=vocab_size),
            plan=plan,
            max_queued_requests=options.max_queued_requests,
            prefixes=self.prefixes if plan.prefix_cache_bytes else None,
            speculation=options.speculation,
        )
        self.guard = MemoryGuard(self.prefixes, forget=self.scheduler.forget)
        self._numbers = itertools.count(1)
        self._inboxes: dict[str, deque[Event]] = {}
        # Reentrant, for a dropped generation may end its request in the middle of a step.
        self._lock = threading.RLock()
        self._closed = False
        self._warm(options.pinned_prompts)

    @classmethod
    def load(
        cls,
        package: Path | str,
        *,
        options: EngineOptions | None = None,
        prepared_root: Path | None = None,
        prefix_root: Path | None = None,
    ) -> Engine:
        """Open a package.

        Args:
            package: The package directory; its files were verified when it was installed.
            options: Limits and choices; None: all automatic.
            prepared_root: Where prepared copies lie; a good one for this machine is used.
            prefix_root: Where prefixes are kept over a restart; None: nowhere.

        Raises:
            ConfigError: If an option is out of range.
            PackageError: If the package cannot be read.
            IncompatiblePackageError: If this machine or agent cannot run it.
            MemoryBudgetError: If it does not fit.
            EngineError: If the runtime fails.
        """
        options = EngineOptions() if options is None else options
        if not isinstance(options, EngineOptions):
            raise ConfigError(f"options is a {type(options).__name__}, but must be EngineOptions")
        options.validate()
        package = Path(package)
        opened = open_package(package, options, prepared_root)
        files = None
        if prefix_root is not None and options.prefix_disk_bytes:
            files = open_prefix_files(package, prefix_root, opened.manifest, opened.plan, options.prefix_disk_bytes)
        trim_heap()
        return cls(opened, options, prefix_files=files)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Args:
            prompt: Text, in which special tokens are plain characters; messages, rendered with the package's chat
                format, also as dictionaries with ``role`` and ``content``; or token ids, taken as they are.

        Raises:
            RequestError: If the package has no chat format, the messages do not suit it, or it is none of these.
        """
        read = read_prompt(prompt)
        if isinstance(read, str):
            generation = self.manifest.generation
            begin = (
                [generation.bos_token_id] if generation.add_bos_token and generation.bos_token_id is not None else []
            )
            return begin + self.tokenizer.encode(read, special=False)
        messages = [item for item in read if isinstance(item, ChatMessage)]
        if not messages:
            return [item for item in read if isinstance(item, int)]
        return self.tokenizer.encode_segments(self._chat_format().render(messages))

    def apply_chat_format(self, messages: Messages) -> str:
        """Return a conversation as the model reads it, with the beginning of an answer.

        Raises:
            RequestError: If the package has no chat format, or the messages do not suit it.
        """
        return "".join(segment.text for segment in self._chat_format().render(read_messages(messages)))

    def open(
        self,
        prompt: Prompt | None = None,
        params: GenerationParams | None = None,
        *,
        max_context_tokens: int | None = None,
        scorer: Scorer | None = None,
    ) -> LiveSequence:
        """Open a text that the caller drives token by token; see ``live.LiveSequence``.

        Args:
            prompt: What it begins with, as for ``generate``.
            params: Options.
            max_context_tokens: Most tokens; None: this slot's share of the memory plan.
            scorer: Sees the tokens so far, int64 [n], and the logits, float32 [vocab_size], and changes them in place
                or returns others.

        Raises:
            RequestError: If an option is out of range or no slot is free.
            ContextOverflowError: If the prompt does not fit.
        """
        self._check_open()
        most = self.plan.max_context_tokens
        capacity = (
            min(most, self.plan.kv_tokens // self.plan.slots) if max_context_tokens is None else max_context_tokens
        )
        if not MIN_CONTEXT_TOKENS <= capacity <= most:
            raise RequestError(
                f"max_context_tokens is {capacity}, but must be {MIN_CONTEXT_TOKENS} to {most}",
                param="max_context_tokens",
            )
        live = LiveSequence(
            self.scheduler,
            self.tokenizer,
            self.manifest.chat_format,
            _options(params),
            capacity=capacity,
            lock=self._lock,
            scorer=scorer,
        )
        try:
            read = [] if prompt is None else read_prompt(prompt)
            messages = [item for item in read if isinstance(item, ChatMessage)]
            if messages:
                live.append_messages(messages)
            elif prompt is not None:
                live.append(self.encode_prompt(prompt))
        except RequestError:
            live.close()
            raise
        return live

    def generate(
        self, prompt: Prompt, params: GenerationParams | None = None, *, scorer: Scorer | None = None
    ) -> Generation:
        """Generate; the last item has ``finished`` set. Several generations may be iterated by turns.

        Args:
            prompt: Text, messages or tokens, see ``encode_prompt``.
            params: Options; None: the package's own.
            scorer: As for ``open``.

        Raises:
            RequestError: If an option is out of range, or options and scorer leave no token to draw.
            ContextOverflowError: If the prompt does not fit.
            EngineError: If the model fails.
        """
        request_id, tokens = f"generate-{next(self._numbers)}", self.encode_prompt(prompt)
        with self._lock:
            self._check_open()
            self.guard.admit()
            self.scheduler.submit(request_id, tokens, _options(params), scorer=scorer)
            self._inboxes[request_id] = deque()
        return Generation(self._iterate(request_id), lambda: self._forget(request_id))

    def embed(self, text: str | list[int]) -> NDArray[np.float32]:
        """Return a text as a vector, float32 [hidden_size] of unit length: the mean of its last hidden states.

        Raises:
            RequestError: If the package gives no embeddings.
            ContextOverflowError: If the text does not fit.
            EngineError: If the model fails.
        """
        request_id, tokens = f"embed-{next(self._numbers)}", self.encode_prompt(text)
        with self._lock:
            self._check_open()
            self.scheduler.submit_embedding(request_id, tokens)
            self._inboxes[request_id] = deque()
        for token in self._iterate(request_id):
            if token.finished is not None and token.finished.embedding is not None:
                return np.array(token.finished.embedding, dtype=np.float32)
        raise EngineError("the text was not computed")

    def close(self) -> None:
        """End all requests and keep prefixes; again without effect.

        The model goes when the engine is dropped, and most of its memory only when the process ends.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for request_id in list(self._inboxes):
                self.scheduler.cancel(request_id)
            self._inboxes.clear()
            if self._prefix_files is not None:
                self._prefix_files.save(self.prefixes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def forget_prefixes(self) -> None:
        """Forget what prompts began with, in memory and on the disk."""
        self.prefixes.clear()
        self.scheduler.forget()
        if self._prefix_files is not None:
            self._prefix_files.clear()

    def _warm(self, pinned_prompts: tuple[str, ...]) -> None:
        """Compute the pinned prompts, and put on disk what was not there."""
        if not (pinned_prompts and self.plan.prefix_cache_bytes):
            return
        if self.manifest.chat_format is None:
            logger.warning("pinned prompts are left out: %s has no chat format", self.manifest.reference)
            return
        try:
            sequences = [pinned_tokens(text, self.encode_prompt) for text in pinned_prompts]
        except RequestError as error:
            logger.warning("pinned prompts are left out: %s", error.message)
            return
        warm(self.prefixes, self.runner, sequences, chunk_tokens=self.plan.prefill_chunk_tokens)
        if self._prefix_files is not None:
            self._prefix_files.save(self.prefixes)

    def _chat_format(self) -> ChatFormat:
        if self.manifest.chat_format is None:
            raise RequestError(
                f"{self.manifest.reference} has no chat format", param="messages", hint="send a plain prompt"
            )
        return self.manifest.chat_format

    def _iterate(self, request_id: str) -> Generator[Token]:
        inbox = self._inboxes[request_id]
        try:
            while True:
                while not inbox:
                    self._step(inbox)
                event = inbox.popleft()
                if isinstance(event, Failed):
                    if event.code is None:
                        raise EngineError(event.message, hint=event.hint)
                    raise RequestError(event.message, code=event.code, param=event.param, hint=event.hint)
                if isinstance(event, Finished):
                    for choice in event.choices[1:]:
                        if choice.text_tail:
                            yield Token(text=choice.text_tail, index=choice.index)
                    yield Token(text=event.text_tail, finished=event)
                    return
                yield Token.of(event)
        finally:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            if self._inboxes.pop(request_id, None) is not None:
                self.scheduler.cancel(request_id)

    def _step(self, inbox: deque[Event]) -> None:
        """Compute a step of all requests, unless another thread's step has filled the inbox meanwhile."""
        with self._lock:
            self._check_open()
            for event in () if inbox else self.scheduler.step():
                asking = self._inboxes.get(event.request_id)
                if asking is not None:
                    asking.append(event)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", hint="load the package again")


def _options(params: GenerationParams | None) -> GenerationParams:
    if params is None:
        return GenerationParams()
    if not isinstance(params, GenerationParams):
        raise RequestError(f"params is a {type(params).__name__}, but must be GenerationParams", param="params")
    return params
