"""From a caller's request to a sequence that the scheduler can run: every check that needs the package is here."""

from __future__ import annotations

import importlib.util
import secrets
from typing import TYPE_CHECKING, Final

import msgspec

from lamplighter_agent.engine.beam_sequence import BeamSequence
from lamplighter_agent.engine.detokenizer import TextCodec
from lamplighter_agent.engine.embedding import EmbeddingSequence
from lamplighter_agent.engine.history import History
from lamplighter_agent.engine.memory import MemoryPlan
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.request import Request
from lamplighter_agent.engine.sampling import Hooks, Sampler, Scorer
from lamplighter_agent.engine.sequence import Sequence
from lamplighter_agent.engine.slots import EXTENSION_TOKENS
from lamplighter_agent.engine.words import resolve_words
from lamplighter_agent.errors import ContextOverflowError, RequestError
from lamplighter_agent.package.manifest import GenerationDefaults

if TYPE_CHECKING:
    from lamplighter_agent.engine.guidance import Guide, Guides

_ENDLESS_TOKENS: Final = 2**31 - 1


class Intake:
    """Turns requests into sequences.

    Args:
        codec: Turns tokens into text and back.
        defaults: The package's stop tokens and sampling defaults.
        plan: Slots, context and cache tokens to keep to.
        vocab_size: Tokens that may occur.

    Attributes:
        vocab_size: As given.
    """

    def __init__(self, codec: TextCodec, *, defaults: GenerationDefaults, plan: MemoryPlan, vocab_size: int) -> None:
        self._codec = codec
        self._defaults = defaults
        self._plan = plan
        self.vocab_size = vocab_size
        self._guides: Guides | None = None

    def sequence(
        self,
        request_id: str,
        prompt: list[int],
        params: GenerationParams,
        *,
        now: float,
        scorer: Scorer | None = None,
    ) -> Sequence:
        """Check a request and return its sequence.

        Raises:
            RequestError: If an option or a token is out of range, or the request is more than the plan has room for.
            ContextOverflowError: If the prompt leaves no room for a token.
        """
        params.validate()
        params.check_vocabulary(self.vocab_size)
        self.check_prompt(prompt)
        params = params.with_defaults(self._defaults)
        room = self._plan.max_context_tokens - len(prompt)
        if params.on_context_full == "slide":
            room = _ENDLESS_TOKENS
            params = msgspec.structs.replace(params, keep_tokens=self._keep_tokens(prompt, params))
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        request = Request(request_id, list(prompt), params, limit=limit, decoder=self._codec, submitted_s=now)
        sampler = self.sampler(History(prompt), params, limit=limit, scorer=scorer)
        sequence: Sequence
        if params.num_beams > 1:
            if scorer is not None:
                raise RequestError("a scorer cannot go with num_beams", param="num_beams")
            sequence = BeamSequence(request, sampler, vocab_size=self.vocab_size)
        else:
            sequence = Sequence(request, sampler)
        self._check_width(sequence)
        return sequence

    def embedding(
        self, request_id: str, prompt: list[int], *, now: float, hidden_size: int | None, deadline_s: float | None
    ) -> Sequence:
        """Check a request for an embedding and return its sequence.

        Raises:
            RequestError: If the package does not give hidden states, or a token is not in the vocabulary.
            ContextOverflowError: If the text does not fit.
        """
        if hidden_size is None:
            raise RequestError(
                "this package gives no embeddings",
                param="model",
                hint="build it again with this version of the builder",
            )
        self.check_prompt(prompt)
        params = GenerationParams(max_tokens=1, temperature=0.0, cache_prompt=False, deadline_s=deadline_s)
        request = Request(request_id, list(prompt), params, limit=1, decoder=self._codec, submitted_s=now)
        return EmbeddingSequence(request, self.sampler(History(prompt), params, limit=1), hidden_size=hidden_size)

    def sampler(
        self, history: History, params: GenerationParams, *, limit: int, scorer: Scorer | None = None
    ) -> Sampler:
        """Return a sampler for checked options with the package's defaults filled in.

        Raises:
            RequestError: If what is forced does not fit into ``limit``, or a grammar cannot be used.
        """
        eos = () if params.ignore_eos else self._defaults.eos_token_ids
        return Sampler(
            params,
            history,
            stop_ids=frozenset((*eos, *params.stop_token_ids)),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            vocab_size=self.vocab_size,
            words=resolve_words(params, self._codec, limit=limit),
            hooks=Hooks(scorer, self._guide(params) if params.guided_by else None),
        )

    def _guide(self, params: GenerationParams) -> Guide:
        """Compile a grammar; the first one loads the grammar engine, which takes a second and memory."""
        if self._guides is None:
            if importlib.util.find_spec("llguidance") is None:
                raise RequestError(
                    "constrained output needs the Python package 'llguidance', which is not installed on this box",
                    param=params.guided_by,
                    hint="pip install 'lamplighter[guidance]'",
                )
            if not self._plan.guidance_bytes:
                raise RequestError(
                    "this machine's memory plan has no room for constrained output",
                    param=params.guided_by,
                    hint="raise the memory budget, lower max_context_tokens, or check the answer instead",
                )
            from lamplighter_agent.engine.guidance import Guides

            self._guides = Guides(
                self._codec.to_json(), vocab_size=self.vocab_size, eos_token_ids=self._defaults.eos_token_ids
            )
        return self._guides.guide(params)

    def live_sampler(
        self, history: History, params: GenerationParams, *, limit: int, scorer: Scorer | None = None
    ) -> Sampler:
        """Return a sampler for options as a caller gives them.

        Raises:
            RequestError: As ``sequence``.
        """
        params.validate()
        params.check_vocabulary(self.vocab_size)
        return self.sampler(history, params.with_defaults(self._defaults), limit=limit, scorer=scorer)

    def first_tokens(self, sequence: Sequence) -> int:
        """Return the cache tokens that a request reserves at its start, for all of its answers."""
        request = sequence.request
        ahead = request.limit if request.params.max_tokens is not None else min(request.limit, EXTENSION_TOKENS)
        return sequence.width * min(len(request.prompt) + ahead, self._plan.max_context_tokens)

    def check_prompt(self, tokens: list[int]) -> None:
        """Check a prompt's tokens and length.

        Raises:
            RequestError: If it is empty or holds a token that is not in the vocabulary.
            ContextOverflowError: If it leaves no room for a token.
        """
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
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise RequestError(
                f"the prompt holds a token id outside the vocabulary of {self.vocab_size}", param="prompt"
            )

    def _keep_tokens(self, prompt: list[int], params: GenerationParams) -> int:
        context = self._plan.max_context_tokens
        if params.keep_tokens is None:
            return min(len(prompt), context // 4)
        if params.keep_tokens > context // 2:
            raise RequestError(
                f"keep_tokens is {params.keep_tokens}, but may be at most {context // 2}, half the context",
                param="keep_tokens",
            )
        return params.keep_tokens

    def _check_width(self, sequence: Sequence) -> None:
        param = "num_beams" if sequence.together else "n"
        if sequence.width > self._plan.slots:
            raise RequestError(
                f"{param} is {sequence.width}, but this machine's memory plan has {self._plan.slots} slots",
                param=param,
                hint="ask for fewer, or configure more slots",
            )
        needed = self.first_tokens(sequence)
        if needed > self._plan.kv_tokens:
            raise RequestError(
                f"{sequence.width} answers to {len(sequence.prompt)} prompt tokens need {needed} cache tokens, "
                f"but this machine's memory plan has {self._plan.kv_tokens}",
                code=413,
                param=param,
                hint="lower max_tokens, shorten the prompt, or ask for fewer",
            )
