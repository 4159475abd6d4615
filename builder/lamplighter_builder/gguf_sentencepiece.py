"""A SentencePiece BPE vocabulary, a score for each piece, as a ``tokenizers`` BPE model.

SentencePiece joins the two neighbours whose join is the piece of the highest score; a BPE model takes a list of pairs,
best first. So the pairs of every piece are listed in the order of the pieces' scores (what transformers does when it
converts Llama's or Gemma's ``tokenizer.model``). Bytes that no piece covers become ``<0xNN>`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.gguf_vocabulary import GgufVocabulary, TokenType

_SPACE: Final = "\u2581"
_MISTRAL_TURN: Final = "[INST]"
_PHI3_KEEPS_SPACE: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def make_sentencepiece_tokenizer(vocabulary: GgufVocabulary) -> Tokenizer:
    """Return the tokenizer, without a post-processor.

    Raises:
        CheckpointError: If there are no scores, or no token for unknown text.
    """
    if not vocabulary.scores:
        raise CheckpointError(f"{vocabulary.origin}: tokenizer.ggml.scores is missing")
    pieces = [
        text.replace(" ", _SPACE) if kind == TokenType.USER_DEFINED and not text.strip(" ") else text
        for text, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True)
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CheckpointError(f"{vocabulary.origin}: tokenizer.ggml.tokens holds a run of spaces twice")
    unknown = vocabulary.special_ids.get("unk_token")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.token_types) if kind == TokenType.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_pairs(pieces, vocabulary)),
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _set_spaces(tokenizer, vocabulary)
    for text, kind in zip(pieces, vocabulary.token_types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([_control(text, vocabulary)])
        elif kind == TokenType.USER_DEFINED and text.strip(_SPACE):
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    return tokenizer


def _set_spaces(tokenizer: Tokenizer, vocabulary: GgufVocabulary) -> None:
    """Set how spaces are written, and where one is put before a text."""
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    as_piece = normalizers.Replace(" ", _SPACE)
    if vocabulary.add_space_prefix is False:
        tokenizer.normalizer = as_piece
    else:
        if _has_mistral_turns(vocabulary):
            # Here the space belongs to the whole text; elsewhere to each run between special tokens.
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), as_piece])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)


def _has_mistral_turns(vocabulary: GgufVocabulary) -> bool:
    """Tell Mistral's vocabularies from version 2 on, in which ``[INST]`` is a control token."""
    return any(
        text == _MISTRAL_TURN and kind == TokenType.CONTROL
        for text, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True)
    )


def _control(text: str, vocabulary: GgufVocabulary) -> AddedToken:
    """Return a control token. Those of Phi-3 take the white space behind them, which the metadata does not say."""
    takes_space = vocabulary.architecture in ("phi3", "phimoe") and text not in _PHI3_KEEPS_SPACE
    return AddedToken(text, special=True, normalized=False, rstrip=takes_space)


def _pairs(pieces: list[str], vocabulary: GgufVocabulary) -> Iterator[tuple[str, str]]:
    """Yield the pairs that make each piece, best piece first, the pair with the longer left side first."""
    made = {
        piece: score
        for piece, kind, score in zip(pieces, vocabulary.token_types, vocabulary.scores, strict=True)
        if kind == TokenType.NORMAL or (kind == TokenType.USER_DEFINED and not piece.strip(_SPACE))
    }
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in made.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in made and right in made:
                found.append((-score, -len(left), -len(right), left, right))
    found.sort(key=lambda pair: pair[:3])
    for *_, left, right in found:
        yield left, right
