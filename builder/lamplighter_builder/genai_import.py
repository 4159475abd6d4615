"""A model folder of onnxruntime-genai becomes a package: the same graph and weights, aligned, proved and described."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from onnx import ModelProto
from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.layout import GENAI_CONFIG_NAME, MODEL_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import (
    FORMAT_VERSION,
    UNKNOWN_LICENCE,
    GenerationDefaults,
    Manifest,
    ModelFacts,
    SelfTest,
    Target,
)
from lamplighter_builder.chat_template import compile_chat_template
from lamplighter_builder.checkpoint import TokenizerFiles, read_tokenizer
from lamplighter_builder.fields import Fields
from lamplighter_builder.genai_facts import describe_groups, model_facts, read_tensors, resident_tensors
from lamplighter_builder.genai_folder import GenaiFolder, read_genai_folder
from lamplighter_builder.graph_check import check_graph
from lamplighter_builder.manifest_parts import (
    check_reference,
    generation_defaults,
    load_tokenizer,
    operator_domains,
    provenance,
    warn_of_unused_sampling,
)
from lamplighter_builder.memory import PREFILL_CHUNK_TOKENS, memory_needs
from lamplighter_builder.package_writer import PackageWriter
from lamplighter_builder.progress import Progress
from lamplighter_builder.relocation import relocate_weights
from lamplighter_builder.runner import keep_whole_caches
from lamplighter_builder.self_test import load_runner, make_self_tests
from lamplighter_builder.targets import GraphTarget

_TOKENIZER_FILES: Final = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_NOTICES: Final = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the user chose.

    Attributes:
        output: Directory of the package; missing or empty.
        name: Package name.
        version: Package version.
        licence: SPDX expression, or None for ``UNKNOWN_LICENCE``: a folder of onnxruntime-genai states none.
        chat_format: Chat format to use instead of compiling the template, or None.
    """

    output: Path
    name: str
    version: str
    licence: str | None = None
    chat_format: ChatFormat | None = None


def import_package(path: Path, options: ImportOptions, progress: Progress) -> Manifest:
    """Make a package of a folder and return its manifest. No weight is quantized again.

    Raises:
        CheckpointError: If a file is missing or damaged.
        UnsupportedModelError: If the graph differs from the contract; the sentence names every difference.
        ChatTemplateError: If the chat template cannot be compiled.
        BuildError: If onnxruntime cannot run the graph.
        ConfigError: If the output directory is not empty.
        DiskFullError: If the disk is full.
    """
    check_reference(options.name, options.version)
    folder = read_genai_folder(path)
    target = GraphTarget(folder.provider, half_arithmetic=folder.half, half_matrices=folder.half)
    vocab_size = folder.model_section.integer("vocab_size")
    tokenizer_files = read_tokenizer(path).within(vocab_size)
    tokenizer = load_tokenizer(tokenizer_files, vocab_size)
    generation = _generation(folder, tokenizer, tokenizer_files)
    warn_of_unused_sampling(folder.search, progress)
    chat_format = options.chat_format
    if chat_format is None and tokenizer_files.chat_template is not None:
        chat_format = compile_chat_template(tokenizer_files.chat_template, tokenizer_files.special_tokens)
    sources = [entry for entry in sorted(path.iterdir()) if entry.is_file()]
    with PackageWriter(options.output) as writer:
        relocate_weights(folder.model, path, writer.directory / WEIGHTS_NAME, progress)
        tensors = read_tensors(folder.model)
        facts = model_facts(folder, tensors)
        _warn_of_lost_window(folder, facts, progress)
        _state_shapes(folder.model, facts)
        keep_whole_caches(folder.model)
        writer.write(MODEL_NAME, folder.model.SerializeToString(deterministic=True))
        check_graph(writer.directory / MODEL_NAME)
        writer.write(TOKENIZER_NAME, tokenizer_files.tokenizer_json)
        writer.write(GENAI_CONFIG_NAME, _genai_config(folder))
        _copy_texts(path, writer)
        self_tests: tuple[SelfTest, ...] = ()
        if target.provider == "cpu":
            runner = load_runner(writer.directory / MODEL_NAME, progress)
            self_tests = make_self_tests(runner, tokenizer, chat_format, generation, facts, progress)
        memory = memory_needs(facts, resident_tensors(tensors), target, head_rows=_head_rows(folder.model))
        # Scales for an 8-bit cache are per pair of rotated features, which are not known here.
        cache_bytes = {target.cache_dtype: memory.kv_bytes_per_token[target.cache_dtype]}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=options.name,
            version=options.version,
            licence=options.licence or UNKNOWN_LICENCE,
            model=facts,
            precision=describe_groups(tensors),
            target=Target(execution_provider=target.provider, operator_domains=operator_domains(folder.model)),
            files=writer.entries(progress),
            memory=msgspec.structs.replace(memory, kv_bytes_per_token=cache_bytes),
            generation=generation,
            chat_format=chat_format,
            self_tests=self_tests,
            provenance=provenance(path.resolve().name, sources, {"imported": "onnxruntime-genai"}, progress),
        )
        writer.finish(manifest)
    return manifest


def _generation(folder: GenaiFolder, tokenizer: Tokenizer, files: TokenizerFiles) -> GenerationDefaults:
    tokens = {key: value for key, value in folder.model_section.values.items() if key.endswith("_token_id")}
    search = Fields({**folder.search.values, **tokens}, folder.search.origin)
    return generation_defaults(search, folder.model_section, tokenizer, files.special_tokens)


def _warn_of_lost_window(folder: GenaiFolder, facts: ModelFacts, progress: Progress) -> None:
    """Tell of a window in the configuration that no layer of the graph has.

    onnxruntime-genai's builder writes such folders for Mistral 7B v0.1, whose layers it does not know to be windowed.
    """
    section = folder.decoder.section("sliding_window")
    window = 0 if section is None else section.integer("window_size", default=0)
    if window > 0 and facts.sliding_window is None:
        progress.warn(
            f"{folder.path}: the configuration names a window of {window} tokens, but the graph's attention has none: "
            "longer texts are computed otherwise than the model was trained; build from its checkpoint for those"
        )


def _copy_texts(path: Path, writer: PackageWriter) -> None:
    """Take the folder's other tokenizer files, licences and notices along."""
    for source in (*(path / name for name in _TOKENIZER_FILES), *(p for n in _NOTICES for p in path.glob(n))):
        if source.is_file():
            writer.write(source.name, source.read_bytes())


def _genai_config(folder: GenaiFolder) -> bytes:
    """Return the folder's configuration with the package's file name for the model."""
    decoder = {key: value for key, value in folder.decoder.values.items() if key != "sliding_window"}
    decoder["filename"] = MODEL_NAME
    config = {**folder.config, "model": {**folder.model_section.values, "decoder": decoder}}
    return (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()


def _state_shapes(model: ModelProto, facts: ModelFacts) -> None:
    """Write heads and features of the cache as numbers, so that the graph can be run without its configuration.

    Shapes between nodes are dropped: they are optional, and onnxruntime-genai's builder writes some that are wrong.
    """
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            shape = value.type.tensor_type.shape
            shape.dim[1].dim_value, shape.dim[3].dim_value = facts.num_key_value_heads, facts.head_dim


def _head_rows(model: ModelProto) -> int:
    has_start = any(value.name == "logits_start" for value in model.graph.input)
    return 1 if has_start else PREFILL_CHUNK_TOKENS
