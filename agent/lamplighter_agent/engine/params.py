"""What a caller may ask of one request. Pure: the agent's main process imports this without a runtime."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.manifest import GenerationDefaults

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS_ENTRIES: Final = 1024
MAX_SEED: Final = 2**63 - 1


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one request. None means the package's own default.

    Attributes:
        max_tokens: Most tokens to generate, >= 1; None: until the context is full.
        min_tokens: Tokens before which no stop token is drawn and no stop string ends the text.
        temperature: 0 picks the most likely token; larger flattens the distribution; 0 to 100.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probabilities reach this sum; in (0, 1].
        min_p: Drop tokens less likely than this share of the most likely one; in [0, 1).
        repetition_penalty: Divides positive, multiplies negative logits of tokens in prompt or text; > 0, 1 off.
        presence_penalty: Subtracted once from the logit of every generated token; -2 to 2.
        frequency_penalty: Subtracted from a token's logit for each time it was generated; -2 to 2.
        logit_bias: Added to the logits of these token ids; -100 to 100.
        stop: Texts that end the generation and are not part of it.
        stop_token_ids: Tokens that end the generation, besides the package's own.
        ignore_eos: Do not stop at the package's end-of-text tokens.
        seed: Same seed, same options, same package, same machine: same text. None draws one.
        logprobs: Report the log-probability of each token and of this many alternatives, 0 to 20; None reports none.
        cache_prompt: Use the prefix cache: take over what is computed of the prompt, and keep the tokens for later.
            Without it the text does not depend, by the last bits of a float, on what was asked before.
        deadline_s: ``time.monotonic()`` value after which the request ends with ``deadline``; None: no bound.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    cache_prompt: bool = True
    deadline_s: float | None = None

    def validate(self) -> None:
        """Check every option's range and that the options agree with each other.

        Raises:
            RequestError: With ``param`` set to the option; the sentence gives the value and the range.
        """
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}", param="min_tokens"
            )
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_count("top_k", self.top_k, 0)
        _check_range("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0, below_high=True)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_count("seed", self.seed, 0, MAX_SEED)
        _check_count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.deadline_s is not None and not math.isfinite(self.deadline_s):
            raise RequestError(f"deadline_s is {self.deadline_s}, but must be finite", param="deadline_s")
        self._check_stops()
        self._check_bias()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that every token id named in the options is in a vocabulary of ``vocab_size`` tokens.

        Raises:
            RequestError: With ``param`` set to the option.
        """
        for param, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{param} names token {token_id}, but the vocabulary has {vocab_size} tokens", param=param
                    )

    def with_defaults(self, defaults: GenerationDefaults) -> GenerationParams:
        """Return a copy in which the package's defaults stand for every sampling option left at None."""
        default_temperature = defaults.temperature if defaults.do_sample else 0.0
        return msgspec.structs.replace(
            self,
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
        )

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} texts, but may have {MAX_STOP_STRINGS}", param="stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise RequestError(
                    f"a stop text has {len(text)} characters, but must have 1 to {MAX_STOP_CHARACTERS}", param="stop"
                )
        for token_id in self.stop_token_ids:
            _check_count("stop_token_ids", token_id, 0)

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries, but may have {MAX_LOGIT_BIAS_ENTRIES}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_count("logit_bias", token_id, 0)
            _check_range("logit_bias", bias, -100.0, 100.0)


def _check_count(param: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is None or (value >= low and (high is None or value <= high)):
        return
    allowed = f"at least {low}" if high is None else f"{low} to {high}"
    raise RequestError(f"{param} is {value}, but must be {allowed}", param=param)


def _check_range(
    param: str, value: float | None, low: float, high: float, *, above_low: bool = False, below_high: bool = False
) -> None:
    if value is None:
        return
    # Written so that NaN, which compares false with everything, is refused too.
    inside = (value > low if above_low else value >= low) and (value < high if below_high else value <= high)
    if not inside:
        opening, closing = "(" if above_low else "[", ")" if below_high else "]"
        raise RequestError(f"{param} is {value}, but must be in {opening}{low:g}, {high:g}{closing}", param=param)
