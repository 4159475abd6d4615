"""Measures how far packages are from the checkpoint that they were built from, on text that no build calibrates on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer

from lamplighter_agent.errors import BuildError, ConfigError, FidelityError, MissingFileError
from lamplighter_agent.package.layout import MODEL_NAME, TOKENIZER_NAME
from lamplighter_agent.package.manifest import Fidelity
from lamplighter_builder.calibrate import Calibrated
from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.package_writer import PackageWriter
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.calibration import TokenArray, cut_windows, read_texts
from lamplighter_builder.quantization.fidelity import Tally
from lamplighter_builder.quantization.report import Report
from lamplighter_builder.runner import Runner
from lamplighter_builder.streamed_model import StreamedModel

_MAX_WINDOWS: Final = 64
"""Windows of 256 tokens that are compared; a longer text is read from its beginning."""


_MIN_TOKENS: Final = 2


def held_out_texts() -> list[str]:
    """Return the texts that come with the builder for this purpose."""
    folder = files("lamplighter_builder.quantization").joinpath("held_out")
    return [entry.read_text(encoding="utf-8") for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)]


class Reference:
    """A checkpoint's predictions on a text, computed once.

    Args:
        checkpoint: The model, run in float32.
        windows: int64 [B, S]; each window is read by itself.
        progress: Hears of the run.

    Raises:
        UnsupportedModelError: If transformers knows the architecture by other tensor names than the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, windows: TokenArray, progress: Progress) -> None:
        progress.stage("fidelity: reference", 1)
        self.name = checkpoint.path.name
        self.windows = windows
        self._model = StreamedModel(checkpoint)
        self._states = self._model.run(self._model.embedding(torch.from_numpy(windows)))
        self._model.forget_embedding()
        progress.advance(1)

    def compare(self, runner: Runner, progress: Progress) -> Fidelity:
        """Compare a package with the reference.

        Raises:
            BuildError: If it has another vocabulary.
        """
        progress.stage("fidelity: package", len(self.windows))
        tally = Tally()
        for index, window in enumerate(self.windows):
            found, _ = runner.run(window[None], runner.empty_cache())
            with torch.no_grad():
                expected = self._model.logits(self._states[index]).numpy()
            if found.shape[-1] != expected.shape[-1]:
                raise BuildError(
                    f"the package has {found.shape[-1]} tokens, but the reference {self.name} has {expected.shape[-1]}",
                    hint="give the checkpoint that the package was built from",
                )
            tally.add(expected, found[0], window[1:])
            progress.advance(1)
        return tally.summary(self.name)


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
    report = Report(package, writer.model_bytes(), fidelity)
    if calibrated is not None:
        report = dataclasses.replace(report, matrices=calibrated.matrices, alternatives=calibrated.alternatives)
    writer.write("fidelity.json", report.to_json())
    writer.write("fidelity.html", report.to_html())


def evaluation_windows(tokenizer: Tokenizer, text: Path | None) -> TokenArray:
    """Return the tokens to compare on, int64 [B, S]: a user's text, or the one that comes with the builder.

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
    return windows[:_MAX_WINDOWS]


def evaluate_packages(
    packages: Sequence[Path], checkpoint: Checkpoint, text: Path | None, progress: Progress
) -> list[Fidelity]:
    """Compare packages, or model folders of onnxruntime-genai, with one checkpoint.

    Args:
        packages: Directories with ``model.onnx`` and ``tokenizer.json``, all of the same tokenizer.
        checkpoint: What they were built from.
        text: A UTF-8 file, or None for the text that comes with the builder.
        progress: Hears of the work.

    Raises:
        ConfigError: If the text cannot be read, is not UTF-8, or too short.
        BuildError: If a package has another vocabulary than the reference, or onnxruntime cannot load it.
        MissingFileError: If a package lacks a file.
    """
    for package in packages:
        for name in (MODEL_NAME, TOKENIZER_NAME):
            if not (package / name).is_file():
                raise MissingFileError(f"{package}: there is no {name}", hint="give the directory of a package")
    windows = evaluation_windows(Tokenizer.from_file(str(packages[0] / TOKENIZER_NAME)), text)
    vocab_size = checkpoint.config.integer("vocab_size")
    if windows.max() >= vocab_size:
        raise BuildError(
            f"{checkpoint.path}: has {vocab_size} tokens, but the package's tokenizer more",
            hint="give the checkpoint that the package was built from",
        )
    reference = Reference(checkpoint, windows, progress)
    return [reference.compare(Runner(package / MODEL_NAME), progress) for package in packages]
