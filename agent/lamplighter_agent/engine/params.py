"""What a caller may ask of one request. Pure: the agent's main process imports this without a runtime."""

from __future__ import annotations

import math
import re
from typing import Final, Literal

import msgspec

from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.manifest import GenerationDefaults

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
MAX_WORDS: Final = 256
MAX_WORD_CHARACTERS: Final = 256
MAX_PREFIX_CHARACTERS: Final = 16_384
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS_ENTRIES: Final = 1024
MAX_SEED: Final = 2**63 - 1
MAX_CHOICES: Final = 64
MAX_NGRAM: Final = 64
MAX_GRAMMAR_CHARACTERS: Final = 32_768

DRY_SEQUENCE_BREAKERS: Final = ("\n", ":", '"', "*")

EarlyStopping = bool | Literal["never"]


class GenerationParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one request. None means the package's own default, or off.

    Rules change the logits in this order: a custom scorer, repetition penalty, presence and frequency penalties, DRY,
    logit bias, no-repeat n-grams, banned words, the ban of stop tokens before ``min_tokens``, the grammar. Then
    temperature, top-k, top-p, min-p, typical-p, XTC and the draw; each looks at what the one before left.

    Attributes:
        max_tokens: Most tokens to generate, >= 1; None: until the context is full.
        min_tokens: Tokens before which no stop token is drawn and no stop string ends the text.
        temperature: 0 picks the most likely token; larger flattens the distribution; 0 to 100.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probabilities reach this sum; in (0, 1].
        min_p: Drop tokens less likely than this share of the most likely one; in [0, 1).
        typical_p: Keep the tokens closest to the expected information up to this mass; in (0, 1], 1 keeps all.
        xtc_probability: Chance of each step to drop the top choices; 0 to 1, 0 off.
        xtc_threshold: A top choice has at least this probability; all but the least likely go; in (0, 0.5].
        repetition_penalty: Divides positive, multiplies negative logits of tokens in prompt or text; > 0, 1 off.
        presence_penalty: Subtracted once from the logit of every generated token; -2 to 2.
        frequency_penalty: Subtracted from a token's logit for each time it was generated; -2 to 2.
        no_repeat_ngram_size: No sequence of this many tokens occurs twice in prompt and text; 0 off, to 64.
        dry_multiplier: Strength of the penalty for lengthening a repetition; 0 off, to 100.
        dry_base: Its growth by token of the repetition; 1 to 100.
        dry_allowed_length: Repetitions shorter than this are free; 1 to 1024.
        dry_sequence_breakers: Repetitions do not reach across a token whose text holds one of these.
        logit_bias: Added to the logits of these token ids; -100 to 100.
        banned_words: Texts whose tokens are never completed, as written and behind a space.
        forced_prefix: Text that the answer begins with; its tokens count as generated.
        forced_words: Texts that the answer contains. Where one is missing when the text would end, or when
            ``max_tokens`` leaves room for nothing else, it is written there, as it stands.
        stop: Texts that end the generation and are not part of it.
        stop_token_ids: Tokens that end the generation, besides the package's own.
        ignore_eos: Do not stop at the package's end-of-text tokens.
        seed: Same seed, same options, same package, same machine: same text. None draws one.
        n: Answers to give; the prompt is computed once. With ``num_beams`` the best ``n`` beams.
        num_beams: Beam search with this many beams; 1 off.
        length_penalty: Beam scores are divided by length to this power; None is 1; -10 to 10.
        early_stopping: True ends beam search once ``num_beams`` texts are complete; False (None) also when the best
            open beam is worse at its present length; "never" only when it cannot become better.
        logprobs: Report the log-probability of each token and of this many alternatives, 0 to 20; None reports none.
        cache_prompt: Use the prefix cache: take over what is computed of the prompt, and keep the tokens for later.
            Without it the text does not depend, by the last bits of a float, on what was asked before.
        speculation: Guess tokens from the text so far and verify several in a step; the tokens are the same without.
        on_context_full: What to do when a slot's context is full: ``stop`` ends with ``length``; ``slide`` forgets the
            oldest tokens behind ``keep_tokens`` and goes on, also beyond the context.
        keep_tokens: Leading tokens that ``slide`` never forgets, at most half the context; None: the prompt's, up to a
            quarter of the context.
        echo: Begin the answer with the prompt's text, and with ``logprobs`` report those of its tokens.
        guided_json: The text is JSON that a JSON Schema, as an object or as text, describes.
        guided_regex: The text matches this regular expression.
        guided_grammar: The text matches this Lark grammar.
        deadline_s: ``time.monotonic()`` value after which the request ends with ``deadline``; None: no bound.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = DRY_SEQUENCE_BREAKERS
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    banned_words: tuple[str, ...] = ()
    forced_prefix: str = ""
    forced_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    logprobs: int | None = None
    cache_prompt: bool = True
    speculation: bool = True
    on_context_full: Literal["stop", "slide"] = "stop"
    keep_tokens: int | None = None
    echo: bool = False
    guided_json: dict[str, object] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    deadline_s: float | None = None

    @property
    def guided_by(self) -> str | None:
        """The option that constrains the text by a grammar, or None."""
        given = _given_grammars(self)
        return given[0] if given else None

    @property
    def restricting(self) -> str | None:
        """The first option given that can leave no token to draw, or None."""
        given = (
            (self.guided_by or "", self.guided_by is not None),
            ("banned_words", bool(self.banned_words)),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size > 0),
            ("logit_bias", bool(self.logit_bias)),
        )
        return next((name for name, is_given in given if is_given), None)

    def validate(self) -> None:
        """Check every option's range and that the options agree with each other.

        Raises:
            RequestError: With ``param`` set to the option; the sentence gives the value and the range.
        """
        _check_types(self)
        _check_ranges(self)
        _check_texts(self)
        _check_stops_and_bias(self)
        _check_guidance(self)
        _check_beams(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}", param="min_tokens"
            )
        if self.keep_tokens is not None and self.on_context_full != "slide":
            raise RequestError("keep_tokens needs on_context_full 'slide'", param="keep_tokens")
        if self.on_context_full == "slide" and self.num_beams > 1:
            raise RequestError("beam search cannot slide: on_context_full must be 'stop'", param="on_context_full")
        if self.temperature == 0.0 and self.xtc_probability > 0.0:
            raise RequestError(
                "xtc_probability drops the top choices, but temperature 0 takes the top choice",
                param="xtc_probability",
            )
        if self.forced_words and self.stop:
            raise RequestError("stop may end the text before forced_words: give only one of them", param="forced_words")
        for word in self.forced_words:
            for banned in self.banned_words:
                if banned in word:
                    raise RequestError(
                        f"forced_words has {word!r}, but banned_words has {banned!r}", param="forced_words"
                    )

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
        default_temperature = defaults.temperature if defaults.do_sample and self.num_beams == 1 else 0.0
        return msgspec.structs.replace(
            self,
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            typical_p=defaults.typical_p if self.typical_p is None else self.typical_p,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
        )


def _check_types(params: GenerationParams) -> None:
    """Check types, which a struct that is made in Python does not: ``stop="END"`` would be three stop texts."""
    try:
        # A message that has these options among its fields is checked by its own decoder for the rest.
        values = msgspec.structs.asdict(params)
        msgspec.convert({name: values[name] for name in GenerationParams.__struct_fields__}, GenerationParams)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        found = re.search(r"\$\.(\w+)", path)
        name = found[1] if found else None
        raise RequestError(f"{name or 'an option'} is not of its type: {what}", param=name) from error


def _check_ranges(params: GenerationParams) -> None:
    _check_count("max_tokens", params.max_tokens, 1)
    _check_count("min_tokens", params.min_tokens, 0)
    _check_range("temperature", params.temperature, 0.0, 100.0)
    _check_count("top_k", params.top_k, 0)
    _check_range("top_p", params.top_p, 0.0, 1.0, above_low=True)
    _check_range("min_p", params.min_p, 0.0, 1.0, below_high=True)
    _check_range("typical_p", params.typical_p, 0.0, 1.0, above_low=True)
    _check_range("xtc_probability", params.xtc_probability, 0.0, 1.0)
    _check_range("xtc_threshold", params.xtc_threshold, 0.0, 0.5, above_low=True)
    _check_range("repetition_penalty", params.repetition_penalty, 0.0, 100.0, above_low=True)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_count("no_repeat_ngram_size", params.no_repeat_ngram_size, 0, MAX_NGRAM)
    _check_range("dry_multiplier", params.dry_multiplier, 0.0, 100.0)
    _check_range("dry_base", params.dry_base, 1.0, 100.0)
    _check_count("dry_allowed_length", params.dry_allowed_length, 1, 1024)
    _check_count("seed", params.seed, 0, MAX_SEED)
    _check_count("n", params.n, 1, MAX_CHOICES)
    _check_count("num_beams", params.num_beams, 1, MAX_CHOICES)
    _check_range("length_penalty", params.length_penalty, -10.0, 10.0)
    _check_count("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _check_count("keep_tokens", params.keep_tokens, 0)
    if params.deadline_s is not None and not math.isfinite(params.deadline_s):
        raise RequestError(f"deadline_s is {params.deadline_s}, but must be finite", param="deadline_s")


def _check_texts(params: GenerationParams) -> None:
    lists = (
        ("stop", params.stop, MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
        ("banned_words", params.banned_words, MAX_WORDS, MAX_WORD_CHARACTERS),
        ("forced_words", params.forced_words, MAX_WORDS, MAX_WORD_CHARACTERS),
        ("dry_sequence_breakers", params.dry_sequence_breakers, MAX_WORDS, MAX_WORD_CHARACTERS),
    )
    for param, texts, most, longest in lists:
        if len(texts) > most:
            raise RequestError(f"{param} has {len(texts)} texts, but may have {most}", param=param)
        for text in texts:
            if not 1 <= len(text) <= longest:
                raise RequestError(
                    f"{param} has a text of {len(text)} characters, but they must have 1 to {longest}", param=param
                )
    if len(params.forced_prefix) > MAX_PREFIX_CHARACTERS:
        raise RequestError(
            f"forced_prefix has {len(params.forced_prefix)} characters, but may have {MAX_PREFIX_CHARACTERS}",
            param="forced_prefix",
        )


def _check_stops_and_bias(params: GenerationParams) -> None:
    for token_id in params.stop_token_ids:
        _check_count("stop_token_ids", token_id, 0)
    if len(params.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries, but may have {MAX_LOGIT_BIAS_ENTRIES}",
            param="logit_bias",
        )
    for token_id, bias in params.logit_bias.items():
        _check_count("logit_bias", token_id, 0)
        _check_range("logit_bias", bias, -100.0, 100.0)


def _check_guidance(params: GenerationParams) -> None:
    given = _given_grammars(params)
    if not given:
        return
    if len(given) > 1:
        raise RequestError(f"{given[0]} and {given[1]} exclude each other", param=given[1])
    for name, value in (("forced_prefix", params.forced_prefix), ("forced_words", params.forced_words)):
        if value:
            raise RequestError(f"{name} cannot go with {given[0]}: the grammar decides", param=name)
    if params.ignore_eos:
        raise RequestError(f"ignore_eos cannot go with {given[0]}: the text ends with the grammar", param="ignore_eos")
    schema = params.guided_json
    size = len(msgspec.json.encode(schema)) if isinstance(schema, dict) else len(schema or "")
    size += len(params.guided_regex or "") + len(params.guided_grammar or "")
    if size > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"{given[0]} has {size} characters, but may have {MAX_GRAMMAR_CHARACTERS}", code=413, param=given[0]
        )


def _given_grammars(params: GenerationParams) -> list[str]:
    grammars = {
        "guided_json": params.guided_json,
        "guided_regex": params.guided_regex,
        "guided_grammar": params.guided_grammar,
    }
    return [name for name, value in grammars.items() if value is not None]


def _check_beams(params: GenerationParams) -> None:
    if params.num_beams == 1:
        for name, value in (("length_penalty", params.length_penalty), ("early_stopping", params.early_stopping)):
            if value is not None:
                raise RequestError(f"{name} is for beam search: set num_beams to 2 or more", param=name)
        return
    if params.n > params.num_beams:
        raise RequestError(f"n is {params.n}, but must be 1 to num_beams, {params.num_beams}", param="n")
    unfit = {
        "temperature": bool(params.temperature),
        "top_k": params.top_k is not None,
        "top_p": params.top_p is not None,
        "min_p": bool(params.min_p),
        "typical_p": params.typical_p not in (None, 1.0),
        "xtc_probability": params.xtc_probability > 0,
        "forced_words": bool(params.forced_words),
        "forced_prefix": bool(params.forced_prefix),
        "logprobs": params.logprobs is not None,
        "echo": params.echo,
        **dict.fromkeys(_given_grammars(params), True),
    }
    for name, given in unfit.items():
        if given:
            raise RequestError(f"{name} cannot go with num_beams {params.num_beams}: beams are not sampled", param=name)


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
