"""Calibrated quantization: listen to the model on text, choose formats for a budget, round with error feedback.

1. *Listen*: one run and its gradients. Labels are drawn from the model's own predictions, so that the mean square of a
   gradient is the Fisher information: half of it times a squared error is the divergence that the error brings.
2. *Choose*: each matrix's expected divergence in each format against its bytes (``quantization/allocation.py``).
3. *Round*: a second run, in which every matrix is quantized just before it is used, on inputs that the matrices before
   it, quantized already, made (``quantization/gptq.py``). Tokens count by how much the model's output depends on them.

Matrices that read the same input (query, key and value; gate and up) have one format, since the graph packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.budget import Budget, check_reach, fit_formats, scheme_of, size_curve
from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.graph import FloatArray, Graph
from lamplighter_builder.matrix_store import CalibratedWeights, MatrixStore
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.activations import activation_noise, weighted_hessian
from lamplighter_builder.quantization.allocation import CANDIDATES, Choice, decode_work, expected_cost
from lamplighter_builder.quantization.blockwise import BlockFormat, QuantizedMatrix
from lamplighter_builder.quantization.calibration import (
    TokenArray,
    read_texts,
    refuse_held_out,
    shipped_texts,
    token_windows,
)
from lamplighter_builder.quantization.gptq import conditional_variance, quantize_gptq
from lamplighter_builder.quantization.least_squares import quantize_least_squares
from lamplighter_builder.quantization.report import Alternative, MatrixReport
from lamplighter_builder.quantization.scheme import Scheme
from lamplighter_builder.streamed_model import StreamedModel

_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_LABEL_SEED: Final = 1
_HEAD_ROWS: Final = 512
"""Tokens whose logits are held at once."""

_MAX_STATE_BYTES: Final = 1 << 30
"""Most bytes of layer inputs kept for the gradients."""

_BACKWARD_WORK: Final = 5
"""Time of a layer's gradients, with the run before them and what is made of its activations; that of its run is 1."""

MatrixQuantizer = Callable[[FloatArray, BlockFormat, FloatArray], QuantizedMatrix]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix of the graph, made of one or several of the checkpoint.

    Attributes:
        path: Module path in the graph, by which a scheme chooses.
        sources: Checkpoint tensors, stacked along N.
        format: Its format in the graph.
    """

    path: str
    sources: tuple[str, ...]
    format: BlockFormat


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much the model's output depends on a matrix.

    Attributes:
        variance: float32 [K], see ``allocation.expected_cost``.
        token_weights: float32 [tokens], the mean square of the output's gradient at each token of the calibration.
        noise: float32 [K] by block size, see ``allocation.expected_cost``; empty where no product reads the matrix.
    """

    variance: FloatArray
    token_weights: torch.Tensor
    noise: Mapping[int, FloatArray] = field(default_factory=dict)

    @classmethod
    def of(cls, x: torch.Tensor, token_weights: torch.Tensor, hessian: FloatArray) -> Sensitivity:
        """Measure it on a matrix's inputs [tokens, K]."""
        sizes = {block_format.block_size for block_format in CANDIDATES}
        noise = {size: activation_noise(x, token_weights, size) for size in sizes if not x.shape[1] % size}
        return cls(conditional_variance(hessian), token_weights, noise)


def packed_matrices(graph: Graph) -> list[PackedMatrix]:
    """Return the matrices of a graph that are quantized."""
    return [
        PackedMatrix(
            weight.outputs[0].name.removesuffix(".weight_codes"),
            tuple(source.name for source in weight.sources),
            weight.format,
        )
        for weight in graph.weights
        if weight.format is not None
    ]


def calibration_tokens(
    paths: Sequence[Path], tokenizer: Tokenizer, chat_format: ChatFormat | None, facts: ModelFacts
) -> TokenArray:
    """Return the tokens to calibrate on, int64 [windows, tokens]: as many as keep the layers' inputs within a bound.

    Args:
        paths: The user's own texts; none: those that come with the builder.
        tokenizer: The model's.
        chat_format: How dialogue is rendered, or None.
        facts: Sizes of the model.

    Raises:
        ConfigError: If a text cannot be read, there is too little, or it is what fidelity is reported on.
    """
    texts = read_texts(paths) if paths else shipped_texts(chat_format)
    refuse_held_out(paths, texts)
    most = _MAX_STATE_BYTES // (4 * facts.hidden_size * (facts.num_hidden_layers + 2))
    return token_windows(texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, most)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration made.

    Attributes:
        weights: The checkpoint's weights, matrices quantized.
        scheme: Their formats.
        matrices: What became of each.
        alternatives: Expected divergence at other sizes; empty where no size was asked for.
    """

    weights: CalibratedWeights
    scheme: Scheme
    matrices: list[MatrixReport]
    alternatives: list[Alternative]


class Calibrator:
    """Quantizes the matrices of a checkpoint on calibration text.

    Args:
        checkpoint: The model.
        windows: Calibration tokens, int64 [B, S].
        progress: Hears of the two runs.
        quantizer: From a weight [N, K], its format and the Hessian [K, K] of its inputs to a matrix.

    Raises:
        UnsupportedModelError: If transformers knows the architecture by other tensor names than the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: TokenArray,
        progress: Progress,
        quantizer: MatrixQuantizer = quantize_gptq,
    ) -> None:
        self._checkpoint = checkpoint
        self._quantizer = quantizer
        self._tokens = torch.from_numpy(windows)
        self._progress = progress
        self._model = StreamedModel(checkpoint)
        self._tied = checkpoint.config.flag("tie_word_embeddings", default=_HEAD not in checkpoint.tensors)
        self._head_hessian: FloatArray | None = None

    def with_quantizer(self, quantizer: MatrixQuantizer) -> Calibrator:
        """Return a calibrator of the same model and text, which has heard what this one has."""
        other = Calibrator(self._checkpoint, self._tokens.numpy(), self._progress, quantizer)
        other._head_hessian = self._head_hessian
        return other

    def quantize_within(
        self,
        budget: Budget | None,
        graph: Graph,
        measure: Callable[[Scheme], int],
        scratch: Path,
    ) -> Calibrated:
        """Quantize every matrix of a graph.

        Args:
            budget: What the package may have; None: every matrix keeps its format.
            graph: The model in the formats that it has without a bound.
            measure: From a scheme to the bytes of the model's files.
            scratch: A directory for the results.

        Raises:
            ConfigError: If the bound is below what four bits a weight need.
            UnsupportedModelError: If a matrix is no linear layer of its own, as the experts of a mixture.
        """
        matrices = packed_matrices(graph)
        self._check_heard(matrices)
        if budget is not None:
            shapes = {matrix.path: [self._shape(name) for name in matrix.sources] for matrix in matrices}
            check_reach(shapes, lambda chosen: measure(scheme_of(chosen)), budget)
        sensitivities = self.listen()
        formats = {matrix.path: matrix.format for matrix in matrices}
        alternatives: list[Alternative] = []
        if budget is not None:
            choices = self.weigh(matrices, sensitivities)
            formats = fit_formats(choices, lambda chosen: measure(scheme_of(chosen)), budget)
            alternatives = size_curve(choices, budget.max_slowdown)
        store = MatrixStore(scratch)
        by_source = {name: formats[matrix.path] for matrix in matrices for name in matrix.sources}
        errors = self.quantize(by_source, sensitivities, store)
        reports = [_report(matrix, formats[matrix.path], errors, self._checkpoint) for matrix in matrices]
        weights = CalibratedWeights(self._checkpoint, store)
        return Calibrated(weights, scheme_of(formats), reports, alternatives)

    def _check_heard(self, matrices: Sequence[PackedMatrix]) -> None:
        heard = {f"{path}.weight" for path in self._model.linear_layers} | {_EMBEDDING, _HEAD}
        for name in (name for matrix in matrices for name in matrix.sources):
            if name not in heard:
                raise UnsupportedModelError(
                    f"{self._checkpoint.path}: {name} cannot be listened to: transformers computes it with others",
                    hint="this architecture cannot be calibrated; build it with --quantizer least-squares",
                )

    def listen(self) -> dict[str, Sensitivity]:
        """Measure the sensitivity of every matrix that the decoder or the head multiplies by, by checkpoint tensor."""
        self._progress.stage("calibration: listening", (1 + _BACKWARD_WORK) * self._model.layer_count)
        found: dict[str, Sensitivity] = {}
        recording = self._model.record(self._model.embedding(self._tokens), done=lambda: self._progress.advance(1))
        states = recording.states.detach()
        gradient, head_weights = self._through_head(states.flatten(0, 1))
        self._head_hessian = weighted_hessian(states.flatten(0, 1), head_weights)
        found[_HEAD] = Sensitivity.of(states.flatten(0, 1), head_weights, self._head_hessian)

        def observe(path: str, x: torch.Tensor, output_gradient: torch.Tensor) -> None:
            weights = output_gradient.square().mean(dim=1)
            found[f"{path}.weight"] = Sensitivity.of(x, weights, weighted_hessian(x, weights))

        def done() -> None:
            self._progress.advance(_BACKWARD_WORK)

        embedded = self._model.backward(recording, gradient.view_as(states), observe, done)
        # A looked-up row is one of many: an error in any of them counts by how often it is read.
        table = self._checkpoint.tensors[_EMBEDDING].shape
        looked_up = (embedded.flatten(0, 1).square().mean(dim=0) / table[0]).numpy()
        if self._tied:
            head = found[_HEAD]
            found[_HEAD] = replace(head, variance=head.variance + looked_up)
        else:
            found[_EMBEDDING] = Sensitivity(looked_up, torch.ones(self._tokens.numel()))
        return found

    def weigh(
        self, matrices: Sequence[PackedMatrix], sensitivities: Mapping[str, Sensitivity]
    ) -> dict[str, list[Choice]]:
        """Return what each matrix can be, with bytes and expected cost, by path."""
        self._progress.stage("calibration: weighing", len(matrices))
        choices = {}
        for matrix in matrices:
            weights = [self._checkpoint.read(name) for name in matrix.sources]
            known = [sensitivities.get(self._listened(name)) for name in matrix.sources]
            choices[matrix.path] = [
                Choice(
                    block_format,
                    sum(block_format.nbytes(*weight.shape) for weight in weights),
                    sum(
                        expected_cost(
                            weight, block_format, sensitivity.variance, sensitivity.noise.get(block_format.block_size)
                        )
                        for weight, sensitivity in zip(weights, known, strict=True)
                        if sensitivity is not None
                    ),
                    decode_work(sum(weight.size for weight in weights), block_format),
                )
                for block_format in CANDIDATES
                if not weights[0].shape[1] % block_format.block_size
            ]
            self._progress.advance(1)
        return choices

    def quantize(
        self, formats: Mapping[str, BlockFormat], sensitivities: Mapping[str, Sensitivity], store: MatrixStore
    ) -> dict[str, Error]:
        """Quantize all matrices and return the error of each output.

        Args:
            formats: Format of each checkpoint tensor.
            sensitivities: From ``listen``.
            store: Is given the results.
        """
        self._progress.stage("calibration: rounding", len(formats))
        head = _EMBEDDING if self._tied else _HEAD
        assert self._head_hessian is not None
        errors: dict[str, Error] = {}

        def finish(name: str, weight: FloatArray, matrix: QuantizedMatrix, hessian: FloatArray) -> None:
            errors[name] = Error.of(weight, matrix, hessian)
            store.add(name, matrix)
            self._progress.advance(1)

        for name in sorted({_EMBEDDING, head} & set(formats)):
            weight, hessian = self._checkpoint.read(name), self._head_hessian
            if name == head:
                matrix = self._quantizer(weight, formats[name], hessian)
            else:  # a table that is only looked up in: every row counts by itself
                matrix, hessian = (
                    quantize_least_squares(weight, formats[name]),
                    np.eye(weight.shape[1], dtype=np.float32),
                )
            finish(name, weight, matrix, hessian)
            if name == _EMBEDDING:
                self._model.embedding.weight.data = torch.from_numpy(matrix.dequantize())

        def visit(path: str, module: nn.Linear, x: torch.Tensor) -> None:
            name = f"{path}.weight"
            if name not in formats:  # its rows are no whole blocks, and it stays as it is
                return
            hessian = weighted_hessian(x, sensitivities[name].token_weights)
            weight = module.weight.detach().numpy()
            matrix = self._quantizer(weight, formats[name], hessian)
            module.weight = nn.Parameter(torch.from_numpy(matrix.dequantize()), requires_grad=False)
            finish(name, weight, matrix, hessian)

        self._model.run(self._model.embedding(self._tokens), visit)
        return errors

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._checkpoint.tensors[name].shape
        return rows, columns

    def _listened(self, name: str) -> str:
        """Return under which name ``listen`` knows a tensor: a tied embedding is the head."""
        return _HEAD if self._tied and name == _EMBEDDING else name

    def _through_head(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a label for each token and return the gradient of its loss [tokens, hidden_size] and the head's weights.

        A token's weight is the expected mean square of the gradient of its logits, whatever label is drawn.
        """
        generator = torch.Generator().manual_seed(_LABEL_SEED)
        gradients, weights = [], []
        for part in torch.split(states, _HEAD_ROWS):
            part.requires_grad_(True)
            log_probabilities = self._model.logits(part).log_softmax(dim=-1)
            probabilities = log_probabilities.detach().exp()
            labels = torch.multinomial(probabilities, 1, generator=generator)
            (gradient,) = torch.autograd.grad(-log_probabilities.gather(1, labels).sum(), part)
            gradients.append(gradient)
            weights.append((probabilities * (1 - probabilities)).mean(dim=1))
        return torch.cat(gradients), torch.cat(weights)


@dataclass(frozen=True, slots=True)
class Error:
    """Squares of a matrix's output on the calibration text: of what quantizing changed, and of the whole."""

    changed: float
    whole: float

    @classmethod
    def of(cls, weight: FloatArray, matrix: QuantizedMatrix, hessian: FloatArray) -> Error:
        """Compute it for a weight [N, K] under a Hessian [K, K]."""
        difference = weight - matrix.dequantize()
        return cls(
            float(np.einsum("nk,nk->", difference @ hessian, difference)),
            float(np.einsum("nk,nk->", weight @ hessian, weight)),
        )


def _report(
    matrix: PackedMatrix, block_format: BlockFormat, errors: Mapping[str, Error], checkpoint: Checkpoint
) -> MatrixReport:
    found = [errors[name] for name in matrix.sources if name in errors]
    whole = sum(error.whole for error in found)
    return MatrixReport(
        path=matrix.path,
        bits=block_format.bits,
        block_size=block_format.block_size,
        symmetric=block_format.symmetric,
        nbytes=sum(block_format.nbytes(*checkpoint.tensors[name].shape) for name in matrix.sources),
        error=float(np.sqrt(sum(error.changed for error in found) / whole)) if whole else 0.0,
    )
