"""A text that the caller drives token by token: look at the logits, change the options, append, go back.

It has a slot of the cache to itself until it is closed, and nothing is computed twice: appended tokens are computed
when the next token is asked for, behind what the cache holds already. Draws are the same as those of
``Engine.generate`` for the same tokens, options and seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

import msgspec

from lamplighter_agent.engine.detokenizer import StopStrings, StreamingDetokenizer
from lamplighter_agent.engine.events import FinishReason, TokenLogprob
from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.intake import Intake
from lamplighter_agent.engine.lending import Lender
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prompts import Messages, read_messages
from lamplighter_agent.engine.sampling import Sampler, Scorer
from lamplighter_agent.engine.scheduler import Scheduler
from lamplighter_agent.engine.tokenizer import PackageTokenizer
from lamplighter_agent.engine.truncation import Logits
from lamplighter_agent.errors import ContextOverflowError, RequestError
from lamplighter_agent.package.chat_format import ChatFormat, ChatMessage, Segment

_CONTEXT_TOKENS: Final = 8
_AGAIN_TOKENS: Final = 2
"""Tokens computed again behind a rewind: the last one for its logits, and one more for ``chunk_length``'s reason."""


class LiveToken(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a live sequence.

    Attributes:
        token_id: The token that was drawn.
        text: Text that became certain, perhaps empty.
        logprob: Its log-probability, if the options ask for it.
        finish_reason: Why the answer ends here; None if it does not. A stop token is not part of the sequence.
    """

    token_id: int
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


class LiveSequence:
    """A live text; made by ``Engine.open``. Closing, dropping or leaving its ``with`` statement gives its slot back.

    Args:
        scheduler: Lends the slot.
        tokenizer: The package's tokenizer.
        chat_format: The package's chat format, for ``append_messages``.
        params: First options.
        capacity: Most tokens of the text.
        lock: Held while the model or its cache are in use, which others share.
        scorer: The caller's own rule.
    """

    _closed = True  # until there is a slot: a sequence that was not made whole is dropped, too

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: PackageTokenizer,
        chat_format: ChatFormat | None,
        params: GenerationParams,
        *,
        capacity: int,
        lock: AbstractContextManager[object],
        scorer: Scorer | None = None,
    ) -> None:
        self._lender: Lender = scheduler.lender
        self._intake: Intake = scheduler.intake
        self._tokenizer = tokenizer
        self._chat_format = chat_format
        self._capacity = capacity
        self._lock = lock
        self._scorer = scorer
        self._params = _checked(params)
        self._history = History([])
        self._grammar_from = 0
        self._messages: list[ChatMessage] = []
        self._sampler: Sampler = self._make_sampler(self._params)
        self._logits: Logits | None = None
        self._detokenizer: StreamingDetokenizer
        self._stops: StopStrings
        self._begin_text()
        with lock:
            self._slot = self._lender.lend(capacity)
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """All tokens of the text so far."""
        tokens: list[int] = self._history.tokens.tolist()
        return tokens

    def __len__(self) -> int:
        return len(self._history)

    @property
    def params(self) -> GenerationParams:
        """The options of the next token. Set other ones at any time; a new seed starts the draws anew.

        Raises:
            RequestError: If one is out of range or makes no sense here.
        """
        return self._params

    @params.setter
    def params(self, params: GenerationParams) -> None:
        checked, before = _checked(params), self._params
        sampler = self._make_sampler(checked)
        if checked.seed == before.seed:
            sampler.draw_like(self._sampler)
        if checked.guided_by is not None and _grammar_of(checked) == _grammar_of(before):
            sampler.follow(self._sampler)
        else:
            self._grammar_from = len(self._history)
        self._sampler, self._params = sampler, checked
        self._stops = StopStrings(checked.stop, held=self._stops.finish())

    def append(self, text: str | Sequence[int]) -> None:
        """Add a text, in which special tokens are plain characters, or token ids; begins a new answer.

        Raises:
            RequestError: If a token is not in the vocabulary.
            ContextOverflowError: If there is no room for it and a token more.
        """
        tokens = self._tokenizer.encode(text, special=False) if isinstance(text, str) else list(text)
        if tokens:
            self._append(tokens)

    def append_messages(self, messages: Messages) -> None:
        """Add messages as the chat format writes them behind the conversation so far, and open an answer.

        The answer that was generated before them is the assistant's message. Where the format writes the conversation
        so far otherwise than it stands here, for example without earlier thoughts, the sequence goes back to where the
        two agree.

        Raises:
            RequestError: If the package has no chat format, or the messages do not suit it.
            ContextOverflowError: If there is no room for them.
        """
        if self._chat_format is None:
            raise RequestError("this package has no chat format", param="messages", hint="append text")
        messages = read_messages(messages)
        conversation = list(self._messages)
        written = ""
        if conversation:
            answer = self._tokenizer.decode(self._history.tokens[self._history.prompt_tokens :].tolist())
            written = "".join(segment.text for segment in self._chat_format.render(conversation)) + answer
            conversation.append(ChatMessage("assistant", answer))
        conversation += messages
        segments = self._chat_format.render(conversation)
        if written and "".join(one.text for one in segments).startswith(written):
            self._append(self._tokenizer.encode_segments(_behind(segments, len(written))))
        else:
            tokens = self._tokenizer.encode_segments(segments)
            agreed = _agreeing(self.tokens, tokens[:-1])
            self.rewind(agreed)
            self._append(tokens[agreed:])
        self._messages = conversation

    def rewind(self, length: int) -> None:
        """Go back to the first ``length`` tokens. A grammar goes back too, or starts anew where the answer is gone.

        Raises:
            RequestError: If the text is not that long.
        """
        if not 0 <= length <= len(self._history):
            raise RequestError(f"length is {length}, but must be 0 to {len(self._history)}", param="length")
        dropped = len(self._history) - length
        cache = self._lender.cache
        with self._lock:
            cache.trim(self._slot, max(cache.offset(self._slot) - max(length - _AGAIN_TOKENS, 0), 0))
        inside = length >= max(self._history.prompt_tokens, self._grammar_from)
        self._history.rewind(length)
        if inside:
            self._sampler.rewind(dropped)
        else:
            if length < self._history.prompt_tokens:
                self._messages = []
            self._sampler = self._remake()
        self._logits = None
        self._begin_text()

    def logits(self) -> Logits:
        """Return the model's logits of the next token, float32 [vocab_size], an array of the caller's own.

        Raises:
            RequestError: If the text is empty.
            EngineError: If the model fails.
        """
        return self._compute()[: self._intake.vocab_size].copy()

    def next(self) -> LiveToken:
        """Draw the next token and add it to the text, unless it is a stop token.

        Raises:
            RequestError: If the text is empty or the sequence closed.
            ContextOverflowError: If the context is full.
            EngineError: If the model fails, or options and scorer leave no token.
        """
        logits = self._compute()
        token_id, report = self._sampler.sample(logits)
        return self._take(token_id, report)

    def accept(self, token_id: int) -> LiveToken:
        """Add a token of the caller's choice as if it had been drawn.

        Raises:
            RequestError: If it is not in the vocabulary.
            ContextOverflowError: If the context is full.
            EngineError: If the grammar does not allow it.
        """
        self._check_open()
        self._check_room(1)
        if not 0 <= token_id < self._intake.vocab_size:
            raise RequestError(f"token {token_id} is outside the vocabulary", param="token_id")
        self._sampler.accept(token_id)
        return self._take(token_id, None)

    def __iter__(self) -> Iterator[LiveToken]:
        """Draw until the answer ends: a stop token or text, ``max_tokens`` tokens from here, or the end of the context.

        Raises:
            As ``next``.
        """
        drawn = 0
        while True:
            token = self.next()
            drawn += 1
            full = len(self._history) >= self._capacity
            if token.finish_reason is None and (full or drawn == self._params.max_tokens):
                token = msgspec.structs.replace(token, text=token.text + self.flush(), finish_reason="length")
            yield token
            if token.finish_reason is not None:
                return

    def flush(self) -> str:
        """Return text that is held back because the next token might change it or complete a stop text."""
        text, met = self._stops.push(self._detokenizer.finish())
        tail = text if met else text + self._stops.finish()
        self._begin_text()
        return tail

    def close(self) -> None:
        """Give the slot back; again without effect."""
        if not self._closed:
            self._closed = True
            with self._lock:
                self._lender.take_back(self._slot)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> LiveSequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, tokens: list[int]) -> None:
        self._check_open()
        self._check_room(len(tokens) + 1)
        self._intake.check_prompt(tokens)
        self._history.extend_prompt(tokens)
        self._sampler = self._remake()
        self._logits = None
        self._begin_text()

    def _take(self, token_id: int, report: TokenLogprob | None) -> LiveToken:
        if token_id in self._sampler.stop_ids:
            self._history.rewind(len(self._history) - 1)
            return LiveToken(token_id=token_id, text=self.flush(), logprob=report, finish_reason="stop")
        self._logits = None
        text = self._detokenizer.push(token_id)
        met = False
        if self._history.generated >= self._params.min_tokens:
            text, met = self._stops.push(text)
        return LiveToken(token_id=token_id, text=text, logprob=report, finish_reason="stop" if met else None)

    def _compute(self) -> Logits:
        """Compute what the cache lacks; return the logits behind the last token."""
        self._check_open()
        if not len(self._history):
            raise RequestError("the text is empty: append something first", param="prompt")
        self._check_room(1)
        if self._logits is None:
            with self._lock:
                self._logits = self._lender.compute(self._slot, self.tokens)
        return self._logits

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the live sequence is closed", param="prompt")

    def _check_room(self, tokens: int) -> None:
        if len(self._history) + tokens > self._capacity:
            raise ContextOverflowError(
                f"the text has {len(self._history)} tokens and is to have {tokens} more, "
                f"but its context is {self._capacity}",
                code=413,
                param="prompt",
                hint="rewind it, or open it with more max_context_tokens",
            )

    def _make_sampler(self, params: GenerationParams) -> Sampler:
        limit = self._capacity if params.max_tokens is None else params.max_tokens
        return self._intake.live_sampler(self._history, params, limit=limit, scorer=self._scorer)

    def _remake(self) -> Sampler:
        """Return a sampler for a new answer that goes on with the same draws."""
        sampler = self._make_sampler(self._params)
        sampler.draw_like(self._sampler)
        self._grammar_from = len(self._history)
        return sampler

    def _begin_text(self) -> None:
        context = self._history.tokens[-_CONTEXT_TOKENS:].tolist()
        self._detokenizer = StreamingDetokenizer(self._tokenizer, context=context)
        self._stops = StopStrings(self._params.stop)


def _checked(params: GenerationParams) -> GenerationParams:
    for name, given in (("n", params.n > 1), ("num_beams", params.num_beams > 1), ("echo", params.echo)):
        if given:
            raise RequestError(f"{name} is not for a live sequence", param=name, hint="use Engine.generate")
    if params.on_context_full != "stop":
        raise RequestError("a live sequence cannot slide", param="on_context_full", hint="rewind it")
    return params


def _grammar_of(params: GenerationParams) -> tuple[object, object, object]:
    return params.guided_json, params.guided_regex, params.guided_grammar


def _behind(segments: list[Segment], characters: int) -> list[Segment]:
    """Return what comes after the first ``characters`` characters."""
    found = []
    for segment in segments:
        if characters < len(segment.text):
            found.append(Segment(segment.text[characters:], segment.trusted))
        characters = max(characters - len(segment.text), 0)
    return found


def _agreeing(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
