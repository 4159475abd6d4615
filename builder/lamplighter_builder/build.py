"""From a checkpoint to a package: graph, weights streamed one by one, tokenizer, chat format, self-test, manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import onnx
from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.layout import GENAI_CONFIG_NAME, MODEL_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import (
    FORMAT_VERSION,
    ExecutionProvider,
    GenerationDefaults,
    Manifest,
    MemoryNeeds,
    ModelFacts,
    Target,
)
from lamplighter_builder.calibrate import Calibrated, Calibrator, calibration_tokens
from lamplighter_builder.chat_template import compile_chat_template
from lamplighter_builder.checkpoint import Checkpoint, TokenizerFiles, WeightSource
from lamplighter_builder.course import expected_course
from lamplighter_builder.drafts import Drafts, count_parameters, finish_graph
from lamplighter_builder.evaluation import Reference, check_fidelity, evaluation_windows, write_report
from lamplighter_builder.examination import Examination, Subject, examine
from lamplighter_builder.genai_config import genai_config, tokenizer_config
from lamplighter_builder.generation import Answer
from lamplighter_builder.graph import Graph, Region
from lamplighter_builder.graph_check import check_graph
from lamplighter_builder.licence import spdx_licence
from lamplighter_builder.manifest_parts import (
    check_reference,
    generation_defaults,
    load_tokenizer,
    operator_domains,
    provenance,
    warn_of_unused_sampling,
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
from lamplighter_builder.quantization.calibration import TokenArray, mixed_windows, shipped_texts
from lamplighter_builder.reference_config import reference_config
from lamplighter_builder.targets import GraphTarget
from lamplighter_builder.weights import check_weights, write_weights

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


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a package before any weight is read.

    Attributes:
        target: Where it will run.
        drafts: Makes its graph in other formats.
        graph: Its graph in the formats that it has without a calibration.
        facts: Sizes of the model.
        tokenizer_files: As the checkpoint has them.
        tokenizer: The tokenizer.
        generation: End tokens and sampling defaults.
        chat_format: How conversations are rendered, or None.
    """

    target: GraphTarget
    drafts: Drafts
    graph: Graph
    facts: ModelFacts
    tokenizer_files: TokenizerFiles
    tokenizer: Tokenizer
    generation: GenerationDefaults
    chat_format: ChatFormat | None

    def encode(self, text: str) -> list[int]:
        """Return a text in tokens, without special ones around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def memory(self, graph: Graph) -> MemoryNeeds:
        """Return what running it costs with the matrices of ``graph``."""
        return memory_needs(self.facts, resident_weights(graph, self.target), self.target)


def build_package(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> Manifest:
    """Build a package and return its manifest.

    Raises:
        BuildError: If the checkpoint cannot be built with these options; see its subclasses.
        ConfigError: If the output directory is not empty.
        DiskFullError: If the disk is full.
    """
    check_reference(options.name, options.version)
    options.quantization.check(options.precision, options.execution_provider)
    outline = make_outline(checkpoint, options)
    warn_of_unused_sampling(checkpoint.generation_config, progress)
    check_comparable(checkpoint, outline, options)
    heard = calibration_windows(outline, options)
    expect_course(outline, options, heard, progress)
    target, facts = outline.target, outline.facts
    with ExitStack() as stack:
        writer = stack.enter_context(PackageWriter(options.output))
        graph = outline.graph
        weights: WeightSource = checkpoint
        calibrated: Calibrated | None = None
        if heard is not None:
            scratch = stack.enter_context(TemporaryDirectory(prefix=".calibration-", dir=options.output.parent))
            budget = options.quantization.budget(facts.parameters)
            calibrator = Calibrator(checkpoint, heard, progress)
            calibrated = calibrator.quantize_within(budget, graph, outline.drafts.measure, Path(scratch))
            graph, weights = outline.drafts.make(calibrated.scheme)[1], calibrated.weights
        regions = write_weights(graph, weights, target, writer.directory / WEIGHTS_NAME, progress)
        written = write_graph(graph, regions, target, facts, writer.directory / MODEL_NAME)
        write_texts(writer, checkpoint, outline, written)
        memory = outline.memory(graph)
        examination = Examination()
        if runs_here(target, memory):
            examination = examine_written(writer, checkpoint, outline, options, progress, heard)
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
            generation=outline.generation,
            chat_format=outline.chat_format,
            self_tests=examination.self_tests,
            fidelity=examination.fidelity,
            provenance=provenance(checkpoint.source, checkpoint.files, options.recorded, progress),
        )
        writer.finish(manifest)
    return manifest


def make_outline(checkpoint: Checkpoint, options: BuildOptions) -> Outline:
    """Read everything but the weights, and compare their names and shapes with the architecture's.

    Raises:
        BuildError: If the checkpoint cannot be built with these options; see its subclasses.
    """
    target = choose_target(options.precision, options.execution_provider)
    drafts = Drafts(checkpoint, target)
    scheme = uniform_scheme(options.precision, options.execution_provider, options.quantization.quantizer)
    model, graph = drafts.make(scheme)
    check_weights(graph, checkpoint, tied=model.config.tie_word_embeddings)
    files = checkpoint.tokenizer().within(model.config.vocab_size)
    tokenizer = load_tokenizer(files, model.config.vocab_size)
    generation = generation_defaults(checkpoint.generation_config, checkpoint.config, tokenizer, files.special_tokens)
    chat_format = options.chat_format
    if chat_format is None and files.chat_template is not None:
        chat_format = compile_chat_template(files.chat_template, files.special_tokens)
    facts = model.config.facts(count_parameters(graph))
    return Outline(target, drafts, graph, facts, files, tokenizer, generation, chat_format)


def expect_course(outline: Outline, options: BuildOptions, heard: TokenArray | None, progress: Progress) -> None:
    """Tell ``progress`` which stages will come; ``heard`` are the tokens of the calibration, None without one."""
    quantization = options.quantization
    progress.expect(
        expected_course(
            options.precision,
            quantization.quantizer,
            hidden_size=outline.facts.hidden_size,
            heard_tokens=0 if heard is None else heard.size,
            sized=quantization.budget(outline.facts.parameters) is not None,
            runs=runs_here(outline.target, outline.memory(outline.graph)),
            compares=options.measure_fidelity,
        )
    )


def check_comparable(checkpoint: Checkpoint, outline: Outline, options: BuildOptions) -> None:
    """Find out whether transformers takes the configuration, where it will be asked to, before the work is done.

    Raises:
        BuildError: If it does not.
    """
    compares = options.measure_fidelity and runs_here(outline.target, outline.memory(outline.graph))
    if compares or options.quantization.quantizer == "gptq":
        reference_config(checkpoint.config)


def calibration_windows(outline: Outline, options: BuildOptions) -> TokenArray | None:
    """Return the tokens to listen to, int64 [windows, tokens]; None where the quantizer does not listen.

    Raises:
        ConfigError: If a text cannot be read, there is too little, or it is what fidelity is reported on.
    """
    quantization = options.quantization
    if quantization.quantizer != "gptq":
        return None
    return calibration_tokens(quantization.calibration, outline.tokenizer, outline.chat_format, outline.facts)


def write_texts(writer: PackageWriter, checkpoint: Checkpoint, outline: Outline, written: onnx.ModelProto) -> None:
    """Write the tokenizer, the licence texts and the configuration of onnxruntime-genai."""
    files, facts = outline.tokenizer_files, outline.facts
    writer.write(TOKENIZER_NAME, files.tokenizer_json)
    writer.write(
        "tokenizer_config.json",
        tokenizer_config(files.special_tokens, files.chat_template, facts.max_position_embeddings),
    )
    writer.copy_notices(checkpoint.notices)
    writer.write(GENAI_CONFIG_NAME, genai_config(facts, outline.generation, outline.target, written.graph))


def examine_written(
    writer: PackageWriter,
    checkpoint: Checkpoint,
    outline: Outline,
    options: BuildOptions,
    progress: Progress,
    heard: TokenArray | None,
) -> Examination:
    """Run the written model, and compare it with the checkpoint unless the options say otherwise.

    ``heard`` are the windows of its calibration, or None: its cache then listens to the builder's own.

    Raises:
        BuildError: If onnxruntime cannot load it.
    """
    if heard is None:
        heard = mixed_windows(shipped_texts(outline.chat_format), outline.encode)
    subject = Subject(
        writer.directory / MODEL_NAME,
        outline.tokenizer,
        outline.chat_format,
        outline.generation,
        outline.facts,
        outline.target,
        heard,
    )
    windows = evaluation_windows(outline.tokenizer, None, outline.facts.max_position_embeddings)

    def open_reference(answers: Sequence[Answer]) -> Reference:
        return Reference(checkpoint, windows, answers, progress)

    return examine(subject, open_reference if options.measure_fidelity else None, progress)


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
