"""What every engine is given: token ids, the same for all (one vocabulary), made from sentences without a model.

The long texts are new in every sentence, so that nothing but the copy-heavy prompts invites copying.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

STORY = "Write a long story about a robot that learns to paint in a small village."
LONG_TOKENS = 1900
PREFILL_TOKENS = 512

_SUBJECTS = ("The harbour master", "A young clockmaker", "Our neighbour", "The night train", "An old surveyor", "She")
_VERBS = ("remembered", "repaired", "described", "lost", "painted", "measured", "sold", "carried home", "drew")
_OBJECTS = ("a copper lantern", "the missing map", "two baskets of figs", "a letter from Riga", "the broken pump")
_PLACES = ("behind the mill", "near the third bridge", "in the empty library", "under heavy rain", "at the ferry")

_RECORDS = (
    ("Anna Keller", "Bremen", 34, "electrician"),
    ("Bogdan Ilic", "Novi Sad", 51, "baker"),
    ("Carla Monti", "Ravenna", 29, "surveyor"),
    ("Dorte Holm", "Aarhus", 46, "nurse"),
    ("Emeka Obi", "Enugu", 38, "teacher"),
    ("Farah Nasser", "Amman", 27, "welder"),
)

_LOG = (
    "2031-04-02 07:14:09 pump-3 pressure 4.18 bar, temperature 61.2 C, state RUNNING",
    "2031-04-02 07:15:41 pump-3 pressure 4.36 bar, temperature 63.9 C, state RUNNING",
    "2031-04-02 07:17:02 pump-3 pressure 5.91 bar, temperature 78.4 C, state WARNING",
    "2031-04-02 07:17:55 pump-3 pressure 6.40 bar, temperature 83.0 C, state STOPPED",
)


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate behind them.

    Attributes:
        chat: A short question.
        prefix: A system prompt's length.
        suffixes: Two questions behind it.
        long: A prompt that nearly fills 2,048 tokens.
        streams: Four prompts.
        copies: Prompts whose answer repeats much of them: JSON of records, an edited log, a text quoted.
        decode_tokens, long_tokens, stream_tokens, copy_tokens: Generated behind each kind.
    """

    chat: list[int]
    prefix: list[int]
    suffixes: list[list[int]]
    long: list[int]
    streams: list[list[int]]
    copies: list[list[int]]
    decode_tokens: int
    long_tokens: int
    stream_tokens: int
    copy_tokens: int

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_workload(path: Path) -> Workload:
    """Read what ``write`` wrote."""
    return Workload(**json.loads(path.read_text(encoding="utf-8")))


def make_workload(tokenizer_path: Path, *, quick: bool) -> Workload:
    """Return the workload in tokens of this tokenizer, with fewer tokens to generate if ``quick``."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def chat(text: str) -> list[int]:
        return tokens(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")

    prose = _prose(200)
    records = " ".join(
        f"{name} lives in {city}, is {age} years old and works as {job}." for name, city, age, job in _RECORDS
    )
    copies = [
        chat(f"Write these people as a JSON list of objects with name, city, age and job.\n\n{records}")
        + tokens('[\n  {"name": "Anna Keller", "city": "Bremen", "age": 34, "job": "electrician"},\n'),
        chat("Repeat this log with pump-3 renamed to pump-7.\n\n" + "\n".join(_LOG))
        + tokens(_LOG[0].replace("pump-3", "pump-7") + "\n"),
        chat(f"Quote the first lines of this text, then summarise it.\n\n{_prose(14)}") + tokens(f'"{_prose(2)}'),
    ]
    return Workload(
        chat=chat(STORY),
        prefix=tokens(prose)[:PREFILL_TOKENS],
        suffixes=[
            tokens(f" {word} asked what had happened there, and why nobody knew.")[:16] for word in ("He", "Mary")
        ],
        long=tokens(prose)[:LONG_TOKENS],
        streams=[chat(f"{STORY} Begin with the word {word}.") for word in ("Rain", "Once", "Blue", "Seven")],
        copies=copies,
        decode_tokens=64 if quick else 128,
        long_tokens=32 if quick else 64,
        stream_tokens=32 if quick else 96,
        copy_tokens=64 if quick else 96,
    )


def _prose(sentences: int) -> str:
    choose = random.Random(7).choice  # the same text in every run
    return " ".join(
        f"{choose(_SUBJECTS)} {choose(_VERBS)} {choose(_OBJECTS)} {choose(_PLACES)}, number {index * 37 % 997}."
        for index in range(sentences)
    )
