"""From a checkpoint to a package: graph, weights streamed one by one, tokenizer, chat format, self-test, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, overload

import numpy as np
import onnx
from tokenizers import Tokenizer

from lamplighter_agent.errors import (
    BuildError,
    CheckpointError,
    WeightMismatchError,
)
from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.layout import GENAI_CONFIG_NAME, MODEL_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import (
    FORMAT_VERSION,
    ExecutionProvider,
    Manifest,
    MemoryNeeds,
    ModelFacts,
    Target,
)
from lamplighter_builder.calibrate import Calibrated, Calibrator, calibration_tokens
from lamplighter_builder.chat_template import compile_chat_template
from lamplighter_builder.checkpoint import Checkpoint, WeightSource
from lamplighter_builder.drafts import Drafts, count_parameters, finish_graph
from lamplighter_builder.evaluation import Reference, check_fidelity, evaluation_windows, write_report
from lamplighter_builder.examination import Examination, OpenReference, Subject, examine
from lamplighter_builder.genai_config import genai_config, tokenizer_config
from lamplighter_builder.graph import Array, FloatArray, Graph, Region, Weight
from lamplighter_builder.graph_check import check_graph
from lamplighter_builder.licence import spdx_licence
from lamplighter_builder.manifest_parts import (
    check_reference,
    generation_defaults,
    load_tokenizer,
    operator_domains,
    provenance,
)
from lamplighter_builder.memory import memory_needs, resident_weights
from lamplighter_builder.package_writer import PackageWriter
from lamplighter_builder.precision import (
    PrecisionName,
    QuantizationOptions,
    choose_target,
    describe_precision,
    uniform_scheme,
)
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.targets import GraphTarget
from lamplighter_builder.weight_file import WeightFile

_FOREIGN_RUN_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What the user chose.

    Attributes:
        output: Directory of the package; missing or empty.
        precision: ``-p``.
        execution_provider: ``-e``.
        name: Package name.
        version: Package version.
        licence: SPDX expression, or None for the checkpoint's own, ``UNKNOWN_LICENCE`` if it states none.
        chat_format: Chat format to use instead of compiling the template, or None.
        quantization: How matrices are quantized.
        measure_fidelity: False to leave out the comparison with the checkpoint.
        max_kl: Largest mean divergence from the checkpoint, nats a token, or None.
    """

    output: Path
    precision: PrecisionName
    name: str
    version: str
    licence: str | None = None
    chat_format: ChatFormat | None = None
    execution_provider: ExecutionProvider = "cpu"
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    measure_fidelity: bool = True
    max_kl: float | None = None

    @property
    def recorded(self) -> dict[str, str | int | float | bool | None]:
        """What the manifest tells of the choices."""
        return {
            "precision": self.precision,
            "execution_provider": self.execution_provider,
            "quantizer": self.quantization.quantizer,
            "target_bytes": self.quantization.target_bytes,
            "bits_per_weight": self.quantization.bits_per_weight,
            "max_slowdown": self.quantization.max_slowdown,
        }


def build_package(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> Manifest:
    """Build a package and return its manifest.

    Raises:
        BuildError: If the checkpoint cannot be built with these options; see its subclasses.
        ConfigError: If the output directory is not empty.
        DiskFullError: If the disk is full.
    """
    check_reference(options.name, options.version)
    options.quantization.check(options.precision, options.execution_provider)
    target = choose_target(options.precision, options.execution_provider)
    drafts = Drafts(checkpoint, target)
    scheme = uniform_scheme(options.precision, options.execution_provider, options.quantization.quantizer)
    model, graph = drafts.make(scheme)
    check_weights(graph, checkpoint, tied=model.config.tie_word_embeddings)
    tokenizer_files = checkpoint.tokenizer()
    tokenizer = load_tokenizer(tokenizer_files, model.config.vocab_size)
    generation = generation_defaults(checkpoint.generation_config, checkpoint.config, tokenizer)
    chat_format = options.chat_format
    if chat_format is None and tokenizer_files.chat_template is not None:
        chat_format = compile_chat_template(tokenizer_files.chat_template, tokenizer_files.special_tokens)
    facts = model.config.facts(count_parameters(graph))
    with ExitStack() as stack:
        writer = stack.enter_context(PackageWriter(options.output))
        weights: WeightSource = checkpoint
        calibrated: Calibrated | None = None
        if options.quantization.quantizer == "gptq":
            scratch = stack.enter_context(TemporaryDirectory(prefix=".calibration-", dir=options.output.parent))
            tokens = calibration_tokens(options.quantization.calibration, tokenizer, chat_format, facts)
            budget = options.quantization.budget(facts.parameters)
            calibrator = Calibrator(checkpoint, tokens, progress)
            calibrated = calibrator.quantize_within(budget, graph, drafts.measure, Path(scratch))
            weights, (_, graph) = calibrated.weights, drafts.make(calibrated.scheme)
        regions = write_weights(graph, weights, target, writer.directory / WEIGHTS_NAME, progress)
        written = write_graph(graph, regions, target, facts, writer.directory / MODEL_NAME)
        writer.write(TOKENIZER_NAME, tokenizer_files.tokenizer_json)
        writer.write(
            "tokenizer_config.json",
            tokenizer_config(
                tokenizer_files.special_tokens, tokenizer_files.chat_template, facts.max_position_embeddings
            ),
        )
        writer.copy_notices(checkpoint.notices)
        writer.write(GENAI_CONFIG_NAME, genai_config(facts, generation, target, written.graph))
        memory = memory_needs(facts, resident_weights(graph, target), target)
        examination = Examination()
        if runs_here(target, memory):
            subject = Subject(writer.directory / MODEL_NAME, tokenizer, chat_format, generation, facts, target)
            examination = examine(subject, reference_opener(checkpoint, tokenizer, options, progress), progress)
            if examination.fidelity is not None:
                check_fidelity(examination.fidelity, options.max_kl)
                write_report(writer, f"{options.name}/{options.version}", examination.fidelity, calibrated)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=options.name,
            version=options.version,
            licence=options.licence or spdx_licence(checkpoint.licence),
            model=facts,
            precision=describe_precision(options.precision, target, graph),
            target=Target(execution_provider=options.execution_provider, operator_domains=operator_domains(written)),
            files=writer.entries(progress),
            memory=memory,
            cache_scales=examination.cache_scales,
            generation=generation,
            chat_format=chat_format,
            self_tests=examination.self_tests,
            fidelity=examination.fidelity,
            provenance=provenance(checkpoint.source, checkpoint.files, options.recorded, progress),
        )
        writer.finish(manifest)
    return manifest


def reference_opener(
    checkpoint: Checkpoint, tokenizer: Tokenizer, options: BuildOptions, progress: Progress
) -> OpenReference | None:
    """Return what runs the reference of the fidelity report; None without a report."""
    if not options.measure_fidelity:
        return None
    windows = evaluation_windows(tokenizer, None)
    return lambda answers: Reference(checkpoint, windows, answers, progress)


def check_weights(graph: Graph, checkpoint: Checkpoint, *, tied: bool) -> None:
    """Compare the tensors that the graph needs with those of the checkpoint, both ways, by name and shape.

    Args:
        graph: Graph with declared weights.
        checkpoint: Where they are read from.
        tied: True if the head is the embedding; a stored head is then a copy and not used.

    Raises:
        WeightMismatchError: If tensors are missing or unused.
        CheckpointError: If a tensor has another shape.
    """
    needed = {source.name: source.shape for weight in graph.weights for source in weight.sources}
    unused = set(checkpoint.tensors) - set(needed) - ({"lm_head.weight"} if tied else set())
    unused = {name for name in unused if not name.endswith(".rotary_emb.inv_freq")}
    missing = set(needed) - set(checkpoint.tensors)
    if missing or unused:
        parts = [
            f"{word}: {', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("not used", unused))
            if names
        ]
        raise WeightMismatchError(
            f"{checkpoint.path}: the tensors are not those of the architecture; {'; '.join(parts)}",
            missing=tuple(sorted(missing)),
            unused=tuple(sorted(unused)),
        )
    for name, shape in needed.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {list(found)}, but must be {list(shape)}"
            )


def write_weights(
    graph: Graph, checkpoint: WeightSource, target: GraphTarget, path: Path, progress: Progress
) -> dict[str, Region]:
    """Write the weights, holding one at a time, and return where each lies.

    Raises:
        BuildError: If a value is beyond the range of its stored type.
        CheckpointError: If a tensor cannot be read or holds values that are not finite.
        OSError: If the disk is full or fails.
    """
    progress.stage("weights", sum(_elements(weight) for weight in graph.weights))
    regions: dict[str, Region] = {}
    with WeightFile(path) as file:
        for weight in graph.weights:
            for spec, array in zip(weight.outputs, _make_arrays(weight, checkpoint), strict=True):
                if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
                    raise BuildError(f"{spec.name}: made {array.dtype}{array.shape}, declared {spec}")
                regions[spec.name] = file.append(target.store(array, target.stored(weight, spec)))
            progress.advance(_elements(weight))
    return regions


def write_graph(
    graph: Graph, regions: Mapping[str, Region], target: GraphTarget, facts: ModelFacts, path: Path
) -> onnx.ModelProto:
    """Write the model as the target needs it beside its weights, and return it.

    Raises:
        BuildError: If the graph breaks a rule of ONNX.
        OSError: If the disk is full or fails.
    """
    model = finish_graph(graph, regions, target, facts)
    path.write_bytes(model.SerializeToString(deterministic=True))
    check_graph(path)
    return model


def runs_here(target: GraphTarget, memory: MemoryNeeds) -> bool:
    """Tell whether the builder runs a package for its self-tests.

    A package for another provider runs on the CPU's kernels with its float16 matrices widened to twice their size, and
    its tokens are another device's: only a small one is worth that.
    """
    return target.provider == "cpu" or memory.weights_bytes <= _FOREIGN_RUN_BYTES


def _make_arrays(weight: Weight, checkpoint: WeightSource) -> Sequence[Array]:
    """Run a weight's recipe: stored codes as they are where they fit, float32 values otherwise."""
    if weight.repack is not None:
        stored = [
            matrix for source in weight.sources if (matrix := _stored_matrix(checkpoint, source.name)) is not None
        ]
        arrays = weight.repack(stored) if len(stored) == len(weight.sources) else None
        if arrays is not None:
            return arrays
    return weight.convert(_Sources(weight, checkpoint))


class _Sources(Sequence[FloatArray]):
    """A weight's sources, read as they are asked for: what a recipe takes one by one is never held together."""

    def __init__(self, weight: Weight, checkpoint: WeightSource) -> None:
        self._names = [source.name for source in weight.sources]
        self._checkpoint = checkpoint

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> FloatArray: ...

    @overload
    def __getitem__(self, index: slice) -> list[FloatArray]: ...

    def __getitem__(self, index: int | slice) -> FloatArray | list[FloatArray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _read_finite(self._checkpoint, self._names[index])


def _stored_matrix(checkpoint: WeightSource, name: str) -> QuantizedMatrix | None:
    matrix = checkpoint.quantized(name)
    if matrix is not None:
        _check_finite(matrix.scales, checkpoint, name)
    return matrix


def _read_finite(checkpoint: WeightSource, name: str) -> FloatArray:
    values = checkpoint.read(name)
    _check_finite(values, checkpoint, name)
    return values


def _check_finite(values: FloatArray, checkpoint: WeightSource, name: str) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{checkpoint.path}: tensor {name} holds NaN or infinite values")


def _elements(weight: Weight) -> int:
    return sum(int(np.prod(source.shape, dtype=np.int64)) for source in weight.sources)
