"""The options of a request as command-line flags: ``--top-k 20`` is ``GenerationParams.top_k``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.errors import ConfigError

_NUMBERS: Final[tuple[tuple[str, type[int] | type[float], str], ...]] = (
    ("max_tokens", int, "most tokens to generate"),
    ("min_tokens", int, "tokens before which nothing ends the text"),
    ("temperature", float, "0 picks the most likely token"),
    ("top_k", int, "sample from the k most likely tokens"),
    ("top_p", float, "sample from the most likely tokens up to this probability"),
    ("min_p", float, "drop tokens below this share of the likeliest"),
    ("typical_p", float, "sample from the most typical tokens up to this probability"),
    ("xtc_probability", float, "chance of each step to drop the top choices"),
    ("xtc_threshold", float, "least probability of a top choice"),
    ("repetition_penalty", float, "above 1: avoid tokens that occurred"),
    ("presence_penalty", float, "subtracted once from tokens that were generated"),
    ("frequency_penalty", float, "subtracted from tokens each time they were generated"),
    ("no_repeat_ngram_size", int, "no sequence of this many tokens occurs twice"),
    ("dry_multiplier", float, "strength of the penalty for lengthening a repetition"),
    ("dry_base", float, "its growth by token"),
    ("dry_allowed_length", int, "shorter repetitions are free"),
    ("seed", int, "same seed, same text"),
    ("n", int, "answers to give"),
    ("num_beams", int, "beam search with this many beams"),
    ("length_penalty", float, "beam scores are divided by length to this power"),
    ("logprobs", int, "report log-probabilities, with this many alternatives (with --json)"),
    ("keep_tokens", int, "leading tokens that sliding never forgets"),
)
_TEXT_LISTS: Final = (
    ("stop", "end at this text"),
    ("banned_words", "never complete this text"),
    ("forced_words", "text that the answer contains"),
    ("dry_sequence_breakers", "repetitions do not reach across this text"),
)
_GRAMMARS: Final = (
    ("guided_json", "a JSON Schema that the answer fits, or @FILE"),
    ("guided_regex", "a regular expression that the answer matches, or @FILE"),
    ("guided_grammar", "a Lark grammar that the answer matches, or @FILE"),
)
_SWITCHES: Final = (
    ("cache_prompt", "take over what is computed of the prompt already (default)"),
    ("speculation", "guess tokens and verify them; the text is the same without (default)"),
)
_EARLY_STOPPING: Final = {"true": True, "false": False, "never": "never"}


def add_generation_arguments(command: argparse.ArgumentParser) -> None:
    """Add a flag for every option."""
    for name, kind, text in _NUMBERS:
        command.add_argument(_flag(name), type=kind, help=text)
    for name, text in _TEXT_LISTS:
        command.add_argument(_flag(name), action="append", help=f"{text}; may be given several times")
    command.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end the text")
    command.add_argument("--logit-bias", action="append", metavar="ID=BIAS", help="added to the logit of a token")
    command.add_argument("--forced-prefix", help="text that the answer begins with")
    command.add_argument("--early-stopping", choices=tuple(_EARLY_STOPPING), help="when beam search ends")
    command.add_argument("--on-context-full", choices=("stop", "slide"), help="what to do when the context is full")
    command.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end-of-text token")
    command.add_argument("--echo", action="store_true", default=None, help="begin with the prompt")
    for name, text in _SWITCHES:
        command.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
    for name, text in _GRAMMARS:
        command.add_argument(_flag(name), help=text)


def generation_params(arguments: argparse.Namespace) -> GenerationParams:
    """Return what the flags say.

    Raises:
        ConfigError: If a file cannot be read or a bias is not written as ID=BIAS.
        RequestError: If an option is out of range or contradicts another.
    """
    given = {name: value for name, value in vars(arguments).items() if name in GenerationParams.__struct_fields__}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given["logit_bias"] = _biases(arguments.logit_bias)
    if arguments.early_stopping is not None:
        given["early_stopping"] = _EARLY_STOPPING[arguments.early_stopping]
    for name, _ in _GRAMMARS:
        given[name] = _text(given[name])
    params = GenerationParams(**{name: value for name, value in given.items() if value is not None})
    params.validate()
    return params


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _biases(texts: list[str] | None) -> dict[int, float]:
    try:
        pairs = [text.split("=", 1) for text in texts or ()]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError as error:
        raise ConfigError(f"--logit-bias must be ID=BIAS, both numbers: {error}") from error


def _text(value: str | None) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
