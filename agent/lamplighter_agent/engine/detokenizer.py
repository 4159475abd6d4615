"""Tokens to text as they come: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

_REPLACEMENT: Final = "\ufffd"


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which have no text."""

    @property
    def byte_token_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for one byte each, for tokenizers with byte fallback."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the tokens, special tokens left out."""


class TextCodec(Decoder, Protocol):
    """A tokenizer's both ways, for options that are texts."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text; ``special`` reads special tokens in it as such."""

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special tokens included."""

    def to_json(self) -> str:
        """Return the tokenizer as ``tokenizer.json`` has it."""


class StreamingDetokenizer:
    """Turns tokens into text piece by piece; the pieces together are ``decoder.decode`` of all tokens.

    A window of tokens is decoded again with each new token, after the tokens that gave the last piece: decoders treat
    the beginning of a text in their own ways, so what a token says shows only behind another one. Text is held back
    while a later token may still change it:

    - a final U+FFFD may be the first bytes of a character (never more than one such mark is open);
    - byte-fallback decoders read a run of byte tokens as a whole, all characters or all U+FFFD, so a run waits for its
      end.

    Args:
        decoder: The tokenizer.
        context: Tokens that come before the text and are not part of it.
    """

    def __init__(self, decoder: Decoder, *, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._context = [token_id for token_id in context if token_id not in decoder.special_ids]
        self._context_characters = len(decoder.decode(self._context)) if self._context else 0
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is certain now, perhaps empty."""
        if token_id in self._decoder.special_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._decoder.byte_token_ids:
            return ""
        text = self._window_text()
        if not text.endswith(_REPLACEMENT):
            piece = text[self._emitted :]
            if text:
                self._context, self._window, self._emitted = self._window, [], 0
                self._context_characters = len(self._decoder.decode(self._context))
            return piece
        piece = text[self._emitted : -1]
        self._emitted = max(self._emitted, len(text) - 1)
        return piece

    def finish(self) -> str:
        """Return the text still held back; the detokenizer is done."""
        piece = self._window_text()[self._emitted :]
        self._context, self._window = [], []
        return piece

    def _window_text(self) -> str:
        return self._decoder.decode(self._context + self._window)[self._context_characters :]


class StopStrings:
    """Cuts a stream of text at the first stop string; holds back text that may be the beginning of one.

    Args:
        stops: Texts that end the stream; they and what follows are never let through.
        held: Text that came before and was not let through yet.
    """

    def __init__(self, stops: tuple[str, ...], *, held: str = "") -> None:
        self._stops = stops
        self._held = held

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return what may be shown, and True if a stop string was met and the stream is over."""
        held = self._held + text
        if not self._stops:
            self._held = ""
            return held, False
        position, found = min(
            ((held.find(stop), stop) for stop in self._stops if stop in held),
            default=(-1, None),
            key=lambda hit: hit[0],
        )
        if found is not None:
            self._held = ""
            return held[:position], True
        keep = self._open_length(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """Return the text still held back: the stream ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            ending = text[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0
