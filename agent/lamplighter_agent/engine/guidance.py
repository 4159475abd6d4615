"""Constrained output: a JSON Schema, a regular expression or a Lark grammar decides which tokens may come next.

The grammar engine is ``llguidance``, the optional extra ``[guidance]``; this is the only module that imports it, and
nothing imports this module before a request asks for a grammar. Grammars come from outside, so what they may cost is
bounded: their size (``params.MAX_GRAMMAR_CHARACTERS``), the work of compiling one, and that of each step.

llguidance's own limits do not cover what it does to find out whether an intersection holds any text, nor remainders:
two loops of 800 characters intersected, or a multiple of 100,000, take half a second, and four times that for twice
the length. ``grammar_limits`` refuses both beforehand. Of the hostile grammars tried then the worst took 0.12 s (a
multiple of 9,973; 0.3 s inside an array) on one core of a Xeon at 2.6 GHz. A schema's own patterns, intersected by
``allOf``, are not bounded beforehand.
"""

from __future__ import annotations

from typing import Final

import llguidance
import msgspec
import numpy as np
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from lamplighter_agent.engine.grammar_limits import check_work, json_schema
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.truncation import Logits
from lamplighter_agent.errors import RequestError

_JSON_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]?[ ]{0,16}"}
"""White space between JSON's tokens is bounded, so that a model cannot go on with it for ever."""

_MAX_MESSAGE_CHARACTERS: Final = 300


def _limits() -> llguidance.LLParserLimits:
    """Return bounds of work: fuel is llguidance's unit, some 10,000 to 50,000 a millisecond."""
    return llguidance.LLParserLimits(
        max_items_in_row=1_000,
        initial_lexer_fuel=100_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


class Guides:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer_json: The tokenizer, as ``tokenizer.json`` has it.
        vocab_size: Tokens that may be drawn.
        eos_token_ids: Tokens that end a text.

    Raises:
        RequestError: If the package has no token that ends a text, or llguidance does not understand its tokenizer.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        if not eos_token_ids:
            raise RequestError("this package has no end-of-text token, which constrained output needs")
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise RequestError(
                f"constrained output does not work with this package's tokenizer: {_first_line(str(error))}"
            ) from error

    def guide(self, params: GenerationParams) -> Guide:
        """Compile the grammar that options hold.

        Raises:
            RequestError: If it is not well-formed, or would cost too much.
        """
        check_work(params)
        name, grammar = _grammar(params)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        guide = Guide(matcher, self._vocab_size, name)
        if not matcher.is_error():
            # The lexer is built with the first mask, and shows only then what it costs.
            guide.mask(np.zeros(self._vocab_size, dtype=np.float32))
        if matcher.is_error():
            raise RequestError(f"{name} cannot be used: {_first_line(matcher.get_error())}", param=name)
        return guide


class Guide:
    """Where a text is in its grammar; a ``sampling.Constraint``.

    Args:
        matcher: llguidance's state.
        vocab_size: Tokens that may be drawn.
        option: The option that gave the grammar.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, option: str) -> None:
        self._matcher = matcher
        self._option = option
        self._vocab_size = vocab_size
        self._words: NDArray[np.int32] = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)

    @property
    def complete(self) -> bool:
        """True if nothing but the end of the text may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: Logits) -> None:
        """Set the logits of tokens that the grammar does not allow to minus infinity.

        Raises:
            RequestError: If the grammar turns out to be too costly.
        """
        fill_next_token_bitmask(self._matcher, self._words)
        self._check()
        allowed = np.unpackbits(self._words.view(np.uint8)[0], bitorder="little")[: self._vocab_size]
        np.putmask(logits, allowed == 0, -np.inf)

    def accept(self, token_id: int) -> None:
        """Go on behind a token that ``mask`` allowed.

        Raises:
            RequestError: If it does not fit.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens`` accepted tokens.

        Raises:
            RequestError: If there are fewer.
        """
        self._matcher.rollback(tokens)
        self._check()

    def copy(self) -> Guide:
        """Return a state of its own at the same place."""
        return Guide(self._matcher.deep_copy(), self._vocab_size, self._option)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar failed: {_first_line(self._matcher.get_error())}", param=self._option)


def _grammar(params: GenerationParams) -> tuple[str, str]:
    """Return the option's name and the grammar in llguidance's form."""
    if params.guided_regex is not None:
        return "guided_regex", llguidance.LLMatcher.grammar_from_regex(params.guided_regex)
    if params.guided_grammar is not None:
        return "guided_grammar", llguidance.LLMatcher.grammar_from_lark(params.guided_grammar)
    try:
        return "guided_json", llguidance.LLMatcher.grammar_from_json_schema(
            msgspec.json.encode(json_schema(params.guided_json)).decode(),
            defaults=_JSON_OPTIONS,  # type: ignore[arg-type]
        )
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"guided_json cannot be read: {_first_line(str(error))}", param="guided_json") from error


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:_MAX_MESSAGE_CHARACTERS]
