"""Compares a package with the checkpoint that it was built from, run by transformers in float32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lamplighter_agent.errors import BuildError
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.runner import IntArray

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
