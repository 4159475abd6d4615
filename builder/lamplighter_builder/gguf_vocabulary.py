"""The ``tokenizer.ggml`` fields of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.fields import Fields

_SPECIAL: Final = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_END_TEXTS: Final = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"}
)
"""Control tokens that end an answer in the families that are supported. Files from before 2024-10 name only one."""


class TokenType(IntEnum):
    """Kinds of tokens in ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokenizer's part of the metadata.

    Attributes:
        origin: Where it came from, for messages.
        architecture: ``general.architecture``.
        kind: ``tokenizer.ggml.model``.
        pre: ``tokenizer.ggml.pre``: how a byte-level vocabulary cuts text.
        tokens: Texts in the order of their ids.
        token_types: Kind of each token.
        scores: Score of each token, higher ones are merged first; empty for byte-level vocabularies.
        merges: Pairs separated by a space, best first; empty for SentencePiece.
        special_ids: Ids by name: ``bos_token``, ``eos_token``, …
        end_ids: Ids that end an answer.
        add_bos: Whether every text begins with ``bos_token``; None if the file does not say.
        add_space_prefix: True if a space is put before a text, None if the file does not say.
    """

    origin: str
    architecture: str
    kind: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special_ids: Mapping[str, int]
    end_ids: tuple[int, ...]
    add_bos: bool | None
    add_space_prefix: bool | None

    @classmethod
    def from_metadata(cls, metadata: Fields) -> GgufVocabulary:
        """Read the ``tokenizer.ggml`` fields.

        Raises:
            CheckpointError: If a field is missing, of another type or length, or an id is out of range.
        """
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens)) or (int(TokenType.NORMAL),) * len(tokens)
        special = {}
        for field, name in _SPECIAL.items():
            ids = _ids(metadata, field, len(tokens))
            if ids:
                special[name] = ids[0]
        ends = [token for field in ("eos", "eot", "eom") for token in _ids(metadata, field, len(tokens))]
        ends += [
            index
            for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == TokenType.CONTROL and text in _END_TEXTS
        ]
        return cls(
            origin=metadata.origin,
            architecture=metadata.text("general.architecture"),
            kind=metadata.text("tokenizer.ggml.model"),
            pre=metadata.text("tokenizer.ggml.pre", default="default"),
            tokens=tokens,
            token_types=tuple(int(kind) for kind in types),
            scores=_numbers(metadata, "tokenizer.ggml.scores", len(tokens)),
            merges=_strings(metadata, "tokenizer.ggml.merges") if metadata.has("tokenizer.ggml.merges") else (),
            special_ids=special,
            end_ids=tuple(dict.fromkeys(ends)),
            add_bos=_flag(metadata, "tokenizer.ggml.add_bos_token"),
            add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix"),
        )

    def special_token_texts(self) -> dict[str, str]:
        """Return the texts of the special tokens by name."""
        return {name: self.tokens[token] for name, token in self.special_ids.items()}


def _ids(metadata: Fields, field: str, tokens: int) -> tuple[int, ...]:
    key = f"tokenizer.ggml.{field}_token_id"
    found = metadata.token_ids(key)
    if any(token >= tokens for token in found):
        raise CheckpointError(f"{metadata.origin}: {key} is {found[0]}, but there are {tokens} tokens")
    return found


def _flag(metadata: Fields, key: str) -> bool | None:
    return metadata.flag(key) if metadata.has(key) else None


def _strings(metadata: Fields, key: str) -> tuple[str, ...]:
    value = metadata.values.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{metadata.origin}: {key} is missing or no list of texts")
    return tuple(value)


def _numbers(metadata: Fields, key: str, count: int) -> tuple[float, ...]:
    """Return a list of numbers, one a token; empty if there is none."""
    value = metadata.values.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise CheckpointError(f"{metadata.origin}: {key} is no list of numbers")
    if len(value) != count:
        raise CheckpointError(f"{metadata.origin}: {key} has {len(value)} values for {count} tokens")
    return tuple(value)
