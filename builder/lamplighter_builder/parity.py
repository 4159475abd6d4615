"""Compares a package with the checkpoint that it was built from, run by transformers in float32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lamplighter_agent.errors import BuildError, ConfigError, MissingFileError
from lamplighter_agent.package.layout import MODEL_NAME, TOKENIZER_NAME
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.runner import IntArray, Runner

_WINDOW_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class Parity:
    """How close two models are, position by position.

    Attributes:
        tokens: Positions compared.
        max_difference: Largest absolute difference of a logit.
        kl_mean: Mean Kullback-Leibler divergence from the reference, nats a token.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
    """

    tokens: int
    max_difference: float
    kl_mean: float
    top1_agreement: float


class Reference:
    """A checkpoint run by transformers in float32.

    Attributes:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.model.train(mode=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a Hugging Face directory or a GGUF file.

        Raises:
            BuildError: If transformers cannot load it.
        """
        folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers warns of its own coming changes
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise BuildError(f"{path}: transformers cannot load it as a reference: {error}") from error
        return cls(model)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.config.vocab_size)

    def logits(self, tokens: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Return float32 [B, S, V] for int64 tokens [B, S]; ``mask`` marks the real ones with 1."""
        with torch.no_grad():
            attention_mask = None if mask is None else torch.from_numpy(mask)
            result = self.model(input_ids=torch.from_numpy(tokens), attention_mask=attention_mask)
        logits: FloatArray = result.logits.float().numpy()
        return logits

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return ``count`` most likely tokens after ``prompt``, passing over end tokens."""
        found: list[int] = []
        with torch.no_grad():
            step = torch.tensor([list(prompt)])
            past = None
            for _ in range(count):
                result = self.model(input_ids=step, past_key_values=past, use_cache=True)
                past = result.past_key_values
                found.append(int(result.logits[0, -1].argmax()))
                step = torch.tensor([found[-1:]])
        return found


def compare_logits(reference: FloatArray, candidate: FloatArray) -> Parity:
    """Compare logits [..., V] of the same positions."""
    vocab = reference.shape[-1]
    expected = torch.from_numpy(reference.reshape(-1, vocab)).double().log_softmax(-1)
    found = torch.from_numpy(candidate.reshape(-1, vocab)).double().log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    return Parity(
        tokens=expected.shape[0],
        max_difference=float(np.abs(reference - candidate).max()),
        kl_mean=float(divergence.mean()),
        top1_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
    )


def compare_on_tokens(reference: Reference, runner: Runner, tokens: Sequence[int]) -> Parity:
    """Compare a package with its reference on a text, cut into windows that are read independently.

    Raises:
        BuildError: If there is no token.
    """
    if not tokens:
        raise BuildError("the text for the comparison is empty")
    parts = []
    for start in range(0, len(tokens), _WINDOW_TOKENS):
        window = np.array([tokens[start : start + _WINDOW_TOKENS]], dtype=np.int64)
        logits, _ = runner.run(window, runner.empty_cache())
        parts.append(compare_logits(reference.logits(window), logits))
    total = sum(part.tokens for part in parts)
    return Parity(
        tokens=total,
        max_difference=max(part.max_difference for part in parts),
        kl_mean=sum(part.kl_mean * part.tokens for part in parts) / total,
        top1_agreement=sum(part.top1_agreement * part.tokens for part in parts) / total,
    )


def evaluate_package(package: Path, reference: Path, text: Path) -> Parity:
    """Compare a package with the checkpoint that it was built from on a text of one's own.

    Args:
        package: Directory with ``model.onnx`` and ``tokenizer.json``.
        reference: A Hugging Face directory or a GGUF file.
        text: A UTF-8 file.

    Raises:
        ConfigError: If the text cannot be read, is empty or is not UTF-8.
        BuildError: If the reference cannot be loaded or has another vocabulary.
        MissingFileError: If the package lacks a file.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: cannot be read as UTF-8 text: {error}") from error
    for name in (MODEL_NAME, TOKENIZER_NAME):
        if not (package / name).is_file():
            raise MissingFileError(f"{package}: there is no {name}", hint="give the directory of a package")
    tokens = Tokenizer.from_file(str(package / TOKENIZER_NAME)).encode(content).ids
    if not tokens:
        raise ConfigError(f"{text}: holds no text")
    loaded = Reference.load(reference)
    if max(tokens) >= loaded.vocab_size:
        raise BuildError(f"{reference}: has {loaded.vocab_size} tokens, but the package's tokenizer has more")
    return compare_on_tokens(loaded, Runner(package / MODEL_NAME), tokens)
