"""The package's tokenizer: text to token ids, in which text from outside never becomes a special token."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Encoding, Tokenizer

from lamplighter_agent.errors import IncompatiblePackageError, PackageError, RequestError
from lamplighter_agent.package.chat_format import Segment

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _ModelFields(msgspec.Struct):
    """What stands for text that the vocabulary lacks: a token, or its place in a unigram vocabulary."""

    unk_token: str | None = None
    unk_id: int | None = None


class _TokenizerFile(msgspec.Struct):
    """The fields of ``tokenizer.json`` read here; vocabulary and merges are skipped, not built as objects."""

    decoder: Any = None
    model: _ModelFields = msgspec.field(default_factory=_ModelFields)


class PackageTokenizer:
    """Wraps ``tokenizers.Tokenizer``; several threads may use it.

    Args:
        tokenizer: The loaded tokenizer; padding and truncation are switched off.
        byte_fallback: True if its decoder turns tokens such as ``<0x0A>`` into bytes.
        unknown: Id of the token for text that the vocabulary lacks, or None.

    Attributes:
        special_ids: Ids of the special tokens. None may come from message content but the one for unknown text.
        byte_token_ids: Ids that stand for one byte each; empty unless ``byte_fallback``.
    """

    def __init__(self, tokenizer: Tokenizer, *, byte_fallback: bool, unknown: int | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # Whether special tokens count is a setting of the tokenizer, not of a call.
        self._lock = threading.Lock()
        self._anchor: tuple[list[int], str] | None = None
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._control_ids = self.special_ids - {unknown}
        self._unknown_text = None if unknown is None else tokenizer.id_to_token(unknown)
        self.byte_token_ids = frozenset(
            token_id
            for token, token_id in (tokenizer.get_vocab().items() if byte_fallback else ())
            if _BYTE_TOKEN.fullmatch(token)
        )

    @classmethod
    def from_file(cls, path: Path) -> PackageTokenizer:
        """Load ``tokenizer.json``.

        Raises:
            PackageError: If the file is missing or cannot be read.
            IncompatiblePackageError: If this version of ``tokenizers`` does not understand it.
        """
        try:
            data = path.read_bytes()
            fields = msgspec.json.decode(data, type=_TokenizerFile)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise PackageError(f"{path}: cannot read the tokenizer: {error}") from error
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception for whatever it does not understand
            raise IncompatiblePackageError(f"{path}: not a tokenizer that this agent understands: {error}") from error
        model = fields.model
        unknown = model.unk_id if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
        return cls(tokenizer, byte_fallback=_uses_byte_fallback(fields.decoder), unknown=unknown)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text, without any token that the text does not contain.

        Args:
            text: The text.
            special: True if special tokens written in the text count as such; False reads them as plain characters.

        Raises:
            RequestError: If the text holds half of a surrogate pair.
        """
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            try:
                ids = list(self._encode(text).ids)
            finally:
                self._tokenizer.encode_special_tokens = False
        if special:
            return ids
        if self._control_ids.isdisjoint(ids) and not self._writes_unknown(text):
            return ids
        # A unigram model may hold a special token's text as an ordinary piece; single characters cannot be one.
        return [token_id for character in text for token_id in self._encode_character(character)]

    def encode_segments(self, segments: list[Segment]) -> list[int]:
        """Return the token ids of a rendered conversation.

        The whole text is encoded at once, exactly as Hugging Face does it. If that gives other special tokens than
        the trusted segments alone, message content holds the text of special tokens: then the runs between the
        format's own special tokens are encoded with special tokens off.
        """
        ids = self.encode("".join(segment.text for segment in segments), special=True)
        wanted = [
            token_id
            for segment in segments
            if segment.trusted
            for token_id in self.encode(segment.text, special=True)
            if token_id in self._control_ids
        ]
        same = [token_id for token_id in ids if token_id in self._control_ids] == wanted
        if same and not any(self._writes_unknown(segment.text) for segment in segments if not segment.trusted):
            return ids
        return self._encode_guarded(segments)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the tokens, special tokens left out."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special tokens included; bytes that are no text show as U+FFFD.

        It is the text that the token has inside a text: decoders strip a space where a text begins.
        """
        if self._anchor is None:
            ids = self.encode("a", special=False)
            self._anchor = (ids, str(self._tokenizer.decode(ids, skip_special_tokens=False)))
        before, text = self._anchor
        return str(self._tokenizer.decode([*before, token_id], skip_special_tokens=False))[len(text) :]

    def to_json(self) -> str:
        """Return the tokenizer as ``tokenizer.json`` has it."""
        return str(self._tokenizer.to_str())

    def _encode(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise RequestError(
                "the text holds half of a surrogate pair, which is no character", param="prompt"
            ) from error

    def _encode_guarded(self, segments: list[Segment]) -> list[int]:
        ids: list[int] = []
        run = ""
        for segment in segments:
            if not segment.trusted:
                run += segment.text
                continue
            for token_id, text in self._split_special(segment.text):
                run += text
                if token_id is not None:
                    ids += self.encode(run, special=False)
                    ids.append(token_id)
                    run = ""
        return ids + self.encode(run, special=False)

    def _split_special(self, text: str) -> Iterator[tuple[int | None, str]]:
        """Yield each special token of trusted text with the plain text before it, then None with the rest."""
        with self._lock:
            encoding = self._encode(text)
        position = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._control_ids:
                yield token_id, text[position:start]
                position = end
        yield None, text[position:]

    def _writes_unknown(self, text: str) -> bool:
        """Tell whether a text spells the token for unknown text, which may have another meaning, such as the end."""
        return self._unknown_text is not None and self._unknown_text in text

    def _encode_character(self, character: str) -> list[int]:
        ids = self._encode(character).ids
        return [token_id for token_id in ids if token_id not in self._control_ids]


def _uses_byte_fallback(decoder: object) -> bool:
    """Tell whether a decoder of ``tokenizer.json``, or one inside its sequence, is ``ByteFallback``."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "ByteFallback":
        return True
    nested = decoder.get("decoders")
    return isinstance(nested, list) and any(_uses_byte_fallback(inner) for inner in nested)
