"""The vocabulary in a GGUF file's metadata, and the ``tokenizer.json`` that encodes as it does.

Two kinds occur in the families that are supported: byte-level BPE with merges (``gpt2``), and SentencePiece's BPE with
a score for each piece (``llama``), see ``gguf_sentencepiece.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.gguf_sentencepiece import make_sentencepiece_tokenizer
from lamplighter_builder.gguf_vocabulary import GgufVocabulary, TokenType

_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES_AND_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """Return the pattern of the cl100k family, in which runs of ``digits`` stay together."""
    return rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"


def _o200k(digits: str, contractions: str) -> str:
    """Return the pattern of the o200k family, which parts words where a capital follows a small letter."""
    words = rf"{_LEAD}{_UPPER}*{_LOWER}+{contractions}|{_LEAD}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a byte-level vocabulary cuts text before merging.

    Attributes:
        pattern: Pieces, or None for GPT-2's own.
        single_digits: True if numerals are cut off one by one first.
        composed: True if text is brought into Unicode's form NFC.
        whole_pieces: True if a piece that is a token needs no merges.
        add_bos: True if texts begin with the first token where the metadata does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    composed: bool = False
    whole_pieces: bool = False
    add_bos: bool = False


_LLAMA3: Final = _PreTokenizer(_cl100k(r"\p{N}{1,3}"), whole_pieces=True, add_bos=True)
_PRE_TOKENIZERS: Final[Mapping[str, _PreTokenizer]] = MappingProxyType(
    {
        "default": _PreTokenizer(),
        "gpt-2": _PreTokenizer(),
        "phi-2": _PreTokenizer(),
        "smollm": _PreTokenizer(single_digits=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "dbrx": _PreTokenizer(_cl100k(r"\p{N}{1,3}")),
        "qwen2": _PreTokenizer(_cl100k(r"\p{N}"), composed=True),
        "deepseek-r1-qwen": _PreTokenizer(_cl100k(r"\p{N}")),
        "gpt-4o": _PreTokenizer(_o200k(r"\p{N}{1,3}", _CONTRACTIONS + "?")),
        "tekken": _PreTokenizer(_o200k(r"\p{N}", ""), whole_pieces=True),
    }
)
"""By ``tokenizer.ggml.pre``: what the ``tokenizer.json`` of the family does; llama.cpp's names are in its
``llama-vocab.cpp``. ``dbrx`` is Phi-4, ``gpt-4o`` Phi-4-mini, ``tekken`` Mistral's newer vocabulary."""


def tokenizer_json(vocabulary: GgufVocabulary) -> bytes:
    """Return the contents of ``tokenizer.json``.

    Raises:
        CheckpointError: If the vocabulary contradicts itself.
        UnsupportedModelError: If it is of an unknown kind.
    """
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.origin}: tokenizer.ggml.tokens holds a token twice")
    if vocabulary.kind == "gpt2":
        tokenizer, add_bos = _make_byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer, add_bos = make_sentencepiece_tokenizer(vocabulary), True
    else:
        raise UnsupportedModelError(
            f"{vocabulary.origin}: tokenizer.ggml.model {vocabulary.kind!r} is not supported",
            hint="supported are: gpt2 (byte-level BPE), llama (SentencePiece BPE)",
        )
    if vocabulary.add_bos is not None:
        add_bos = vocabulary.add_bos
    bos_id = vocabulary.special_ids.get("bos_token")
    if add_bos and bos_id is not None:
        bos = vocabulary.tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer.to_str(pretty=False).encode()


def _make_byte_level(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    """Return a byte-level BPE tokenizer, and whether its texts begin with the first token by default."""
    how = _PRE_TOKENIZERS.get(vocabulary.pre)
    if how is None:
        raise UnsupportedModelError(
            f"{vocabulary.origin}: tokenizer.ggml.pre {vocabulary.pre!r} is not supported",
            hint=f"supported are: {', '.join(sorted(_PRE_TOKENIZERS))}",
        )
    vocab = {text: index for index, text in enumerate(vocabulary.tokens)}
    merges = [_pair(merge, vocab, vocabulary.origin) for merge in vocabulary.merges]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=how.whole_pieces)
    )
    if how.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if how.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if how.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(how.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how.pattern is None))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True):
        if kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
        elif kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    return tokenizer, how.add_bos


def _pair(merge: str, vocab: Mapping[str, int], origin: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not {left, right, left + right} <= vocab.keys():
        raise CheckpointError(
            f"{origin}: tokenizer.ggml.merges has {merge!r}, which does not join two tokens to a third"
        )
    return left, right
