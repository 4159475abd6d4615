"""How far one model's predictions are from another's, position by position on held-out text. Pure on arrays."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from lamplighter_agent.package.fidelity import AccuracyLevelFidelity, CacheFidelity, Fidelity
from lamplighter_builder.quantization.blockwise import FloatArray
from lamplighter_builder.quantization.calibration import TokenArray

_ROWS: Final = 256
"""Positions compared at once, so that few rows of float64 logits are held."""


class Tally:
    """Collects positions; ``summary`` gives their statistics."""

    def __init__(self) -> None:
        self._divergences: list[torch.Tensor] = []
        self._agreed = 0
        self._chosen: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._reference_losses: list[torch.Tensor] = []
        self.max_difference = 0.0

    @property
    def tokens(self) -> int:
        """Positions so far."""
        return sum(len(part) for part in self._divergences)

    def add(self, reference: FloatArray, candidate: FloatArray, following: TokenArray) -> None:
        """Compare the predictions of two models.

        Args:
            reference: Logits [positions, V].
            candidate: Logits [positions, V] at the same positions.
            following: int64 [positions - 1] or [positions], the token that came after each; for the perplexity.
        """
        for begin in range(0, len(reference), _ROWS):
            rows = slice(begin, begin + _ROWS)
            expected = torch.from_numpy(reference[rows]).double().log_softmax(-1)
            found = torch.from_numpy(candidate[rows]).double().log_softmax(-1)
            self._divergences.append((expected.exp() * (expected - found)).sum(-1))
            self._chosen.append(found.argmax(-1))
            self._agreed += int((expected.argmax(-1) == self._chosen[-1]).sum())
            labels = torch.from_numpy(following[rows])[:, None]
            self._losses.append(-found[: len(labels)].gather(1, labels)[:, 0])
            self._reference_losses.append(-expected[: len(labels)].gather(1, labels)[:, 0])
            difference = np.abs(reference[rows] - candidate[rows]).max()
            self.max_difference = max(self.max_difference, float(difference))

    def compare_level(self, exact: Tally) -> AccuracyLevelFidelity:
        """Compare with a tally of the same positions, in which activations were not rounded.

        Raises:
            ValueError: If there is no position.
        """
        return AccuracyLevelFidelity(
            tokens=self.tokens,
            flipped=self._flipped(exact),
            kl_mean=self._kl_mean(),
            level_1_kl_mean=exact._kl_mean(),
        )

    def compare_cache(self, coded: Tally) -> CacheFidelity:
        """Compare with a tally of the same positions, with a cache of 8-bit codes.

        Raises:
            ValueError: If there is no position.
        """
        return CacheFidelity(
            tokens=self.tokens,
            flipped=self._flipped(coded),
            kl_mean=coded._kl_mean(),
            float32_kl_mean=self._kl_mean(),
        )

    def summary(self, reference: str) -> Fidelity:
        """Return the statistics.

        Args:
            reference: What was compared with, for the report.

        Raises:
            ValueError: If there is no position.
        """
        divergences = torch.cat(self._divergences)
        return Fidelity(
            kl_mean=self._kl_mean(),
            kl_median=float(divergences.median()),
            kl_p99=float(divergences.quantile(0.99)),
            top1_agreement=self._agreed / len(divergences),
            perplexity=_perplexity(self._losses),
            reference_perplexity=_perplexity(self._reference_losses),
            tokens=len(divergences),
            reference=reference,
        )

    def _kl_mean(self) -> float:
        return float(torch.cat(self._divergences).mean())

    def _flipped(self, other: Tally) -> float:
        """Return the share of positions with another most likely token in a tally of the same positions."""
        return float((torch.cat(self._chosen) != torch.cat(other._chosen)).double().mean())


def _perplexity(losses: list[torch.Tensor]) -> float | None:
    joined = torch.cat(losses)
    return float(joined.mean().exp()) if len(joined) else None
