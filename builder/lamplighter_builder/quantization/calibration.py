"""Calibration text: what the quantizer listens to a model on. It is never the text that fidelity is reported on.

The set that comes with the builder is small and varied: prose, dialogue, technical writing, several languages and
programs in several more, all written for this project and under its licence.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import ConfigError, RequestError
from lamplighter_agent.package.chat_format import ChatFormat, ChatMessage, Role

TokenArray = npt.NDArray[np.int64]

WINDOW_TOKENS: Final = 256
MIN_WINDOWS: Final = 4
_SHUFFLE_SEED: Final = 0
_TELLING_LENGTH: Final = 60
"""Characters of a line that no other text has by chance."""

_DIALOGUE: Final = "dialogue.txt"
_DATE: Final = datetime.date(2026, 1, 1)
"""For chat formats that state the date: the same build makes the same bytes on any day."""

_ROLES: Final[Mapping[str, Role]] = {"system": "system", "user": "user", "assistant": "assistant"}


def shipped_texts(chat_format: ChatFormat | None) -> list[str]:
    """Return the texts that come with the builder, dialogue in the model's own chat format if it has one."""
    texts = []
    for resource in sorted(files("lamplighter_builder.quantization").joinpath("texts").iterdir(), key=lambda r: r.name):
        text = resource.read_text(encoding="utf-8")
        texts.append(render_dialogue(text, chat_format) if resource.name == _DIALOGUE else text)
    return texts


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read a user's own calibration texts.

    Raises:
        ConfigError: If a file cannot be read, or is not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="name a text file") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: cannot be read as UTF-8 text: {error}", hint="give plain text, encoded as UTF-8"
            ) from error
    return texts


def held_out_texts() -> list[str]:
    """Return the texts on which builds report their fidelity."""
    folder = files("lamplighter_builder.quantization").joinpath("held_out")
    return [entry.read_text(encoding="utf-8") for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)]


def refuse_held_out(paths: Sequence[Path], texts: Sequence[str]) -> None:
    """Refuse calibration texts that hold what fidelity is reported on: the report would tell nothing.

    Raises:
        ConfigError: If one does.
    """
    telling = [line for text in held_out_texts() for line in text.splitlines() if len(line) >= _TELLING_LENGTH]
    for path, text in zip(paths, texts, strict=False):  # the builder's own have no path
        if any(line in text for line in telling):
            raise ConfigError(
                f"{path}: holds text that builds report their fidelity on",
                hint="calibrate on other text, and measure with lamplighter-builder evaluate --text",
            )


def render_dialogue(text: str, chat_format: ChatFormat | None) -> str:
    """Turn lines ``role: text`` into the model's own format; an empty line parts conversations."""
    if chat_format is None:
        return text
    return "".join(_render(conversation, chat_format) for conversation in text.split("\n\n"))


def _render(conversation: str, chat_format: ChatFormat) -> str:
    messages = _parse(conversation)
    try:
        segments = chat_format.render(messages, add_generation_prompt=False, today=_DATE)
    except RequestError:  # a role or an order that this format has not
        return conversation
    return "".join(segment.text for segment in segments)


def token_windows(texts: Sequence[str], encode: Callable[[str], Sequence[int]], max_tokens: int) -> TokenArray:
    """Cut texts into windows to calibrate on.

    Args:
        texts: What to cut.
        encode: From a text to its tokens.
        max_tokens: Most tokens to return.

    Returns:
        int64 [windows, 256].

    Raises:
        ConfigError: If there is too little text.
    """
    found = mixed_windows(texts, encode)
    if len(found) < MIN_WINDOWS:
        raise ConfigError(
            f"the calibration text makes {len(found)} windows of {WINDOW_TOKENS} tokens, but {MIN_WINDOWS} are needed",
            hint="give more text, in longer files",
        )
    return found[: max(MIN_WINDOWS, max_tokens // WINDOW_TOKENS)]


def mixed_windows(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> TokenArray:
    """Return the whole windows of the texts, mixed so that any first few of them are varied: int64 [windows, 256]."""
    found = cut_windows(texts, encode)
    return found[np.random.default_rng(_SHUFFLE_SEED).permutation(len(found))]


def cut_windows(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> TokenArray:
    """Return the whole windows of the texts, in their order: int64 [windows, 256]."""
    windows = [np.empty((0, WINDOW_TOKENS), dtype=np.int64)]
    for text in texts:
        tokens = np.asarray(encode(text), dtype=np.int64)
        whole = len(tokens) // WINDOW_TOKENS
        windows.append(tokens[: whole * WINDOW_TOKENS].reshape(whole, WINDOW_TOKENS))
    return np.concatenate(windows)


def _parse(conversation: str) -> list[ChatMessage]:
    messages: list[ChatMessage] = []
    for line in conversation.strip().splitlines():
        role, colon, rest = line.partition(": ")
        if colon and role in _ROLES:
            messages.append(ChatMessage(_ROLES[role], rest))
        elif messages:
            last = messages.pop()
            messages.append(ChatMessage(last.role, f"{last.content}\n{line}"))
    return messages
