"""From a GGUF file's vocabulary to a ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.fields import Fields

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_PRE_TOKENIZERS: Final[Mapping[str, pre_tokenizers.PreTokenizer]] = MappingProxyType(
    {
        "default": _bytes(use_regex=True),
        "gpt-2": _bytes(use_regex=True),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True)]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), _bytes(use_regex=False)]
        ),
    }
)
"""How text is cut before merging, by ``tokenizer.ggml.pre``."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokenizer's part of the metadata.

    Attributes:
        kind: ``tokenizer.ggml.model``: ``gpt2`` is byte-level BPE.
        pre: ``tokenizer.ggml.pre``.
        tokens: Texts in the order of their ids.
        token_types: Kind of each token (3 control, 4 user defined).
        merges: Pairs separated by a space, best first.
        special_ids: Ids by name: ``bos_token``, ``eos_token``, …
        add_bos: True if every text begins with ``bos_token``.
    """

    kind: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    special_ids: Mapping[str, int]
    add_bos: bool

    @classmethod
    def from_metadata(cls, metadata: Fields) -> GgufVocabulary:
        """Read the ``tokenizer.ggml`` fields.

        Raises:
            CheckpointError: If a field is missing or of another type.
        """
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        special = {}
        for field, name in names.items():
            ids = metadata.token_ids(f"tokenizer.ggml.{field}_token_id")
            if ids:
                special[name] = ids[0]
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        types = metadata.values.get("tokenizer.ggml.token_type", [1] * len(tokens))
        if not isinstance(types, list) or len(types) != len(tokens):
            raise CheckpointError(
                f"{metadata.origin}: tokenizer.ggml.token_type does not match the {len(tokens)} tokens"
            )
        for name, token in special.items():
            if token >= len(tokens):
                raise CheckpointError(f"{metadata.origin}: {name} is {token}, but there are {len(tokens)} tokens")
        return cls(
            kind=metadata.text("tokenizer.ggml.model"),
            pre=metadata.text("tokenizer.ggml.pre", default="default"),
            tokens=tokens,
            token_types=tuple(types),
            merges=_strings(metadata, "tokenizer.ggml.merges") if metadata.has("tokenizer.ggml.merges") else (),
            special_ids=special,
            add_bos=metadata.flag("tokenizer.ggml.add_bos_token", default=False),
        )

    def special_token_texts(self) -> dict[str, str]:
        """Return the texts of the special tokens by name."""
        return {name: self.tokens[token] for name, token in self.special_ids.items()}


def tokenizer_json(vocabulary: GgufVocabulary) -> bytes:
    """Return the contents of ``tokenizer.json``.

    Raises:
        UnsupportedModelError: If the vocabulary is of an unknown kind.
    """
    if vocabulary.kind != "gpt2":
        raise UnsupportedModelError(
            f"GGUF tokenizer kind {vocabulary.kind!r} is not supported", hint="supported is: gpt2 (byte-level BPE)"
        )
    if vocabulary.pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {vocabulary.pre!r} is not supported",
            hint=f"supported are: {', '.join(sorted(_PRE_TOKENIZERS))}",
        )
    vocab = {text: index for index, text in enumerate(vocabulary.tokens)}
    if len(vocab) != len(vocabulary.tokens):
        raise CheckpointError("the GGUF vocabulary holds a token twice")
    pairs = [_pair(merge) for merge in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[vocabulary.pre]
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN):
            token = AddedToken(text, special=kind != _USER_DEFINED, normalized=False)
            (tokenizer.add_tokens if kind == _USER_DEFINED else tokenizer.add_special_tokens)([token])
    if vocabulary.add_bos and "bos_token" in vocabulary.special_ids:
        bos = vocabulary.special_token_texts()["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer.to_str(pretty=False).encode()


def _strings(metadata: Fields, key: str) -> tuple[str, ...]:
    value = metadata.values.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{metadata.origin}: {key} is missing or no list of strings")
    return tuple(value)


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space:
        raise CheckpointError(f"the GGUF vocabulary has a merge {merge!r} without a space")
    return left, right
