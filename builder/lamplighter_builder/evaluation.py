"""Measures how far packages are from the checkpoint that they were built from, on text that no build calibrates on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from lamplighter_agent.errors import BuildError, ConfigError, FidelityError
from lamplighter_agent.package.fidelity import Fidelity, GenerationFidelity
from lamplighter_agent.package.manifest import CacheScales
from lamplighter_agent.text import printable
from lamplighter_builder.calibrate import Calibrated
from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.generation import Answer
from lamplighter_builder.package_writer import PackageWriter
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.calibration import TokenArray, cut_windows, held_out_texts, read_texts
from lamplighter_builder.quantization.fidelity import Tally
from lamplighter_builder.quantization.page import render_page
from lamplighter_builder.quantization.report import Report
from lamplighter_builder.runner import EXACT_ACTIVATIONS, Runner
from lamplighter_builder.streamed_model import StreamedModel

_MAX_WINDOWS: Final = 64
"""Windows of 256 tokens that are compared; a longer text is read from its beginning."""


_MIN_TOKENS: Final = 2
_SAMPLE_WINDOWS: Final = 4
"""Windows on which accuracy levels and caches are compared."""

_MANY_FLIPS: Final = 0.05
"""Share of changed tokens from which on a user is warned. Rounding activations changes 2 to 4 % of a small model's most
likely tokens, nearly all near-ties."""


class Reference:
    """A checkpoint's predictions on a text and behind answers, computed in one run.

    Args:
        checkpoint: The model, run in float32.
        windows: int64 [B, S]; each window is read by itself.
        answers: What packages answered, each with at least one token; none if only windows are compared.
        progress: Hears of the run.

    Attributes:
        choices: For each answer the checkpoint's choice at each of its tokens.

    Raises:
        UnsupportedModelError: If transformers knows the architecture by other tensor names than the checkpoint's.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: TokenArray, answers: Sequence[Answer], progress: Progress
    ) -> None:
        self.name = printable(checkpoint.source)
        self.windows = windows
        self._model = StreamedModel(checkpoint)
        # Two runs, though each reads the weights: a layer's activations are the most that is held, and answers as wide
        # as windows would nearly double them.
        progress.stage("fidelity: reference", (2 if answers else 1) * self._model.layer_count)
        behind_answers: Sequence[torch.Tensor] = ()
        if answers:
            behind_answers = list(self._run([answer.prompt + answer.tokens for answer in answers], progress))
        self.choices = [self._choices(*pair) for pair in zip(answers, behind_answers, strict=True)]
        self._states = self._run(windows.tolist(), progress)
        self._model.forget_embedding()

    def _run(self, texts: Sequence[Sequence[int]], progress: Progress) -> torch.Tensor:
        """Return what the head is given for each text, float32 [texts, longest, hidden_size]."""
        tokens = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text  # what is behind a text does not change what is before it
        return self._model.run(self._model.embedding(torch.from_numpy(tokens)), done=lambda: progress.advance(1))

    def compare(
        self, runner: Runner, generation: GenerationFidelity, scales: CacheScales | None, progress: Progress
    ) -> Fidelity:
        """Compare a package with the reference.

        Args:
            runner: Its model, loaded.
            generation: What came of its answers.
            scales: Of its 8-bit cache, or None where it has none.
            progress: Hears of the work.

        Raises:
            BuildError: If it has another vocabulary.
        """
        rows = range(len(self.windows))
        sample = rows[:: -(-len(rows) // _SAMPLE_WINDOWS)]
        found = Tally()
        tally = self.tally(runner, progress, dict.fromkeys(sample, found))
        fidelity = msgspec.structs.replace(tally.summary(self.name), generation=generation)
        runner.unload()
        if runner.has_accuracy_level():
            progress.stage("fidelity: level 1", len(sample))
            exact = self._sample(runner.with_accuracy_level(EXACT_ACTIVATIONS), sample, progress)
            fidelity = msgspec.structs.replace(fidelity, accuracy_level=found.compare_level(exact))
        if scales is not None:
            progress.stage("fidelity: int8 cache", len(sample))
            coded = self._sample(runner.with_int8_cache(scales), sample, progress)
            fidelity = msgspec.structs.replace(fidelity, int8_cache=found.compare_cache(coded))
        return fidelity

    def _sample(self, runner: Runner, windows: Sequence[int], progress: Progress) -> Tally:
        """Compare the predictions on some windows."""
        tally = Tally()
        for index in windows:
            self._add([tally], index, runner)
            progress.advance(1)
        return tally

    def tally(self, runner: Runner, progress: Progress, also: Mapping[int, Tally] | None = None) -> Tally:
        """Compare a package's predictions on all windows; those of some are given to other tallies too.

        Raises:
            BuildError: If it has another vocabulary.
        """
        progress.stage("fidelity: package", len(self.windows))
        tally = Tally()
        for index in range(len(self.windows)):
            self._add([tally] if also is None or index not in also else [tally, also[index]], index, runner)
            progress.advance(1)
        return tally

    def _add(self, tallies: Sequence[Tally], index: int, runner: Runner) -> None:
        """Compare the predictions on one window."""
        window = self.windows[index]
        found, _ = runner.run(window[None], runner.empty_cache())
        with torch.no_grad():
            expected = self._model.logits(self._states[index]).numpy()
        if found.shape[-1] != expected.shape[-1]:
            raise BuildError(
                f"the package has {found.shape[-1]} tokens, but the reference {self.name} has {expected.shape[-1]}",
                hint="give the checkpoint that the package was built from",
            )
        for tally in tallies:
            tally.add(expected, found[0], window[1:])

    def _choices(self, answer: Answer, states: torch.Tensor) -> list[int]:
        before = len(answer.prompt) - 1
        with torch.no_grad():
            logits = self._model.logits(states[before : before + len(answer.tokens)])
        return [int(token) for token in logits.argmax(dim=-1)]


def warnings_of(fidelity: Fidelity) -> list[str]:
    """Return what a user should know before a fleet does, a sentence each."""
    found = []
    generation, level = fidelity.generation, fidelity.accuracy_level
    if generation is not None and generation.endless_loops:
        found.append(
            f"{generation.endless_loops} of {generation.prompts} greedy answers repeat themselves without end where "
            "the checkpoint would go on; more bytes for the head help (--target-mb)"
        )
    if level is not None and level.flipped > _MANY_FLIPS:
        found.append(
            f"rounding activations to 8 bits (accuracy level 4) changes {level.flipped:.1%} of the most likely tokens; "
            f"without it the KL divergence is {level.level_1_kl_mean:.4f} instead of {level.kl_mean:.4f}"
        )
    return found


def check_fidelity(fidelity: Fidelity, max_kl: float | None) -> None:
    """Compare a package's divergence with what the user allows.

    Raises:
        FidelityError: If it is larger.
    """
    if max_kl is not None and not fidelity.kl_mean <= max_kl:
        raise FidelityError(
            f"the package's mean KL divergence from {fidelity.reference} is {fidelity.kl_mean:.4f} nats a token, "
            f"but --max-kl allows {max_kl:g}",
            hint="give it more bytes with --target-mb, or use --quantizer gptq",
        )


def write_report(writer: PackageWriter, package: str, fidelity: Fidelity, calibrated: Calibrated | None) -> None:
    """Write the fidelity report of a package whose model is written, as data and as a page."""
    report = Report(package, writer.model_bytes(), fidelity, warnings=warnings_of(fidelity))
    if calibrated is not None:
        report = dataclasses.replace(report, matrices=calibrated.matrices, alternatives=calibrated.alternatives)
    writer.write("fidelity.json", report.to_json())
    writer.write("fidelity.html", render_page(report))


def evaluation_windows(tokenizer: Tokenizer, text: Path | None, context: int) -> TokenArray:
    """Return the tokens to compare on, int64 [B, S]: a user's text, or the one that comes with the builder.

    Windows are as long as ``context``, the model's ``max_position_embeddings``, at most.

    Raises:
        ConfigError: If the text cannot be read, is not UTF-8, or empty.
    """
    texts = held_out_texts() if text is None else read_texts([text])

    def encode(content: str) -> list[int]:
        return tokenizer.encode(content, add_special_tokens=False).ids

    windows = cut_windows(texts, encode)
    if not len(windows):
        windows = np.array([encode("".join(texts))], dtype=np.int64)
        if windows.size < _MIN_TOKENS:
            raise ConfigError(f"{text}: holds no text to compare on", hint="give a longer text")
    return windows[:_MAX_WINDOWS, :context]
