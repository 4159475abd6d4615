"""What each method of quantization gains: a table of sizes and divergences, and the time that each takes.

    scripts/bench quantization --model CHECKPOINT                    methods one by one, and together at three sizes
    scripts/bench quantization --model CHECKPOINT --sizes 90 120     other sizes, in megabytes
    scripts/bench quantization --model CHECKPOINT --text FILE        compare on a text of your own as well
    scripts/bench quantization --model CHECKPOINT --only gptq        methods whose name holds a word

Every row is a model that is written, loaded by onnxruntime and compared with the checkpoint on text that nothing was
calibrated on. The checkpoint is listened to once, for all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME
from lamplighter_builder.budget import Budget, fit_formats, scheme_of
from lamplighter_builder.build import write_graph, write_weights
from lamplighter_builder.calibrate import (
    Calibrator,
    MatrixQuantizer,
    Sensitivity,
    calibration_tokens,
    packed_matrices,
)
from lamplighter_builder.chat_template import compile_chat_template
from lamplighter_builder.checkpoint import WeightSource
from lamplighter_builder.drafts import Drafts, count_parameters
from lamplighter_builder.evaluation import Reference, evaluation_windows
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.manifest_parts import load_tokenizer
from lamplighter_builder.matrix_store import CalibratedWeights, MatrixStore
from lamplighter_builder.precision import choose_target, uniform_scheme
from lamplighter_builder.quantization.allocation import Choice
from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix
from lamplighter_builder.quantization.gptq import quantize_gptq
from lamplighter_builder.quantization.least_squares import quantize_least_squares
from lamplighter_builder.quantization.rtn import quantize_rtn
from lamplighter_builder.quantization.scheme import Quantizer
from lamplighter_builder.runner import Runner
from lamplighter_builder.sources import open_checkpoint
from lamplighter_builder.terminal_progress import TerminalProgress

SIZES_MB = (90.0, 105.0, 120.0)


def weighted(weight: FloatArray, block_format: BlockFormat, hessian: FloatArray) -> QuantizedMatrix:
    """Search for scales, features weighted by their activations."""
    return quantize_least_squares(weight, block_format, np.ascontiguousarray(hessian.diagonal()))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: What the table calls it.
        rounds: Quantizes a matrix by itself, or None.
        listens: Quantizes a matrix by the Hessian of its inputs, where ``rounds`` is None.
        bits: Those of the formats that a size may choose from, empty without a size.
    """

    name: str
    rounds: Quantizer | None = None
    listens: MatrixQuantizer = quantize_gptq
    bits: tuple[int, ...] = ()


ALONE = (
    Method("rtn", quantize_rtn),
    Method("least squares", quantize_least_squares),
    Method("least squares, weighted by activations", listens=weighted),
    Method("gptq"),
)
TOGETHER = (
    Method("formats by size (4, 8 bits), rtn", quantize_rtn, bits=(4, 8)),
    Method("formats by size (4, 8 bits), gptq", bits=(4, 8)),
    Method("formats by size (4, 5, 6, 8 bits), rtn", quantize_rtn, bits=(4, 5, 6, 8)),
    Method("formats by size (4, 5, 6, 8 bits), gptq", bits=(4, 5, 6, 8)),
)


@dataclass(frozen=True)
class Row:
    """What a method came to: KL divergence on each text, nats a token."""

    method: str
    target_mb: float | None
    megabytes: float
    divergences: tuple[float, ...]
    top1_agreement: float
    quantize_s: float


class Bench:
    """Runs methods on one checkpoint."""

    def __init__(self, model: str, texts: Sequence[Path]) -> None:
        self.progress = TerminalProgress(sys.stderr)
        self.checkpoint = open_checkpoint(model, None, None)
        self.target = choose_target("int4", "cpu")
        self.drafts = Drafts(self.checkpoint, self.target)
        decoder, self.graph = self.drafts.make(uniform_scheme("int4", "cpu", "least-squares"))
        files = self.checkpoint.tokenizer()
        tokenizer = load_tokenizer(files, decoder.config.vocab_size)
        chat_format = files.chat_template and compile_chat_template(files.chat_template, files.special_tokens)
        self.facts = decoder.config.facts(count_parameters(self.graph))
        self.windows = calibration_tokens((), tokenizer, chat_format or None, self.facts)
        self.listener = Calibrator(self.checkpoint, self.windows, self.progress)
        self.sensitivities: Mapping[str, Sensitivity] = self.listener.listen()
        self.choices = self.listener.weigh(packed_matrices(self.graph), self.sensitivities)
        context = self.facts.max_position_embeddings
        self.references = [
            Reference(self.checkpoint, evaluation_windows(tokenizer, text, context), (), self.progress)
            for text in (None, *texts)
        ]

    def run(self, method: Method, target_mb: float | None) -> Row:
        """Quantize, write, load and compare."""
        matrices = packed_matrices(self.graph)
        formats = {matrix.path: matrix.format for matrix in matrices}
        if target_mb is not None:
            choices = {path: _of(options, method.bits) for path, options in self.choices.items()}
            budget = Budget(int(target_mb * 1e6))
            formats = fit_formats(choices, lambda chosen: self.drafts.measure(scheme_of(chosen)), budget)
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            started = time.monotonic()
            weights: WeightSource = self.checkpoint
            if method.rounds is None:
                store = MatrixStore(folder)
                by_source = {name: formats[matrix.path] for matrix in matrices for name in matrix.sources}
                self.listener.with_quantizer(method.listens).quantize(by_source, self.sensitivities, store)
                weights = CalibratedWeights(self.checkpoint, store)
            _, graph = self.drafts.make(scheme_of(formats, method.rounds or quantize_least_squares))
            regions = write_weights(graph, weights, self.target, folder / WEIGHTS_NAME, self.progress)
            took = time.monotonic() - started
            write_graph(graph, regions, self.target, self.facts, folder / MODEL_NAME)
            megabytes = sum((folder / name).stat().st_size for name in (MODEL_NAME, WEIGHTS_NAME)) / 1e6
            runner = Runner(folder / MODEL_NAME)
            found = [reference.tally(runner, self.progress).summary("") for reference in self.references]
        divergences = tuple(fidelity.kl_mean for fidelity in found)
        return Row(method.name, target_mb, megabytes, divergences, found[0].top1_agreement, took)


def _of(options: Sequence[Choice], bits: tuple[int, ...]) -> list[Choice]:
    return [choice for choice in options if choice.format.bits in bits]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint: directory, GGUF file or hub id")
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES_MB, metavar="MB", help="sizes of the model")
    parser.add_argument("--text", type=Path, action="append", default=[], help="UTF-8 text to compare on as well")
    parser.add_argument("--only", default="", metavar="WORD", help="only methods whose name holds this")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row instead")
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.text)
    show: Callable[[Row], None] = _show_json if arguments.json else _show
    if not arguments.json:
        names = ["held-out", *(path.name for path in arguments.text)]
        texts = "".join(f" KL, {name} |" for name in names)
        print(f"| method | asked MB | MB |{texts} top-1 | quantizing s |")
        print("|---|---|---|" + "---|" * (len(arguments.text) + 3))
    rows = [(method, None) for method in ALONE] + [(method, size) for size in arguments.sizes for method in TOGETHER]
    for method, size in rows:
        if arguments.only in method.name:
            show(bench.run(method, size))
    return 0


def _show(row: Row) -> None:
    asked = "" if row.target_mb is None else f"{row.target_mb:g}"
    divergences = "".join(f" {value:.4f} |" for value in row.divergences)
    start, end = (
        f"| {row.method} | {asked} | {row.megabytes:.2f} |",
        f" {row.top1_agreement:.1%} | {row.quantize_s:.0f} |",
    )
    print(f"{start}{divergences}{end}", flush=True)


def _show_json(row: Row) -> None:
    print(json.dumps(row.__dict__), flush=True)


if __name__ == "__main__":
    sys.exit(main())
