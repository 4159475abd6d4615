"""``evaluate``: packages, or model folders of onnxruntime-genai, side by side against the checkpoint they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lamplighter_agent.errors import BuildError, ChatTemplateError, ConfigError, MissingFileError, PackageError
from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.fidelity import Fidelity
from lamplighter_agent.package.layout import GENAI_CONFIG_NAME, MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME
from lamplighter_agent.package.manifest import CacheScales, read_manifest
from lamplighter_builder.chat_template import compile_chat_template
from lamplighter_builder.checkpoint import Checkpoint, TokenizerFiles
from lamplighter_builder.evaluation import Reference, evaluation_windows
from lamplighter_builder.genai_folder import read_genai_folder
from lamplighter_builder.generation import PROMPTS, compare_answers, encode_prompt, generate_answers
from lamplighter_builder.manifest_parts import generation_defaults, load_tokenizer
from lamplighter_builder.progress import Progress
from lamplighter_builder.quantization.calibration import held_out_texts
from lamplighter_builder.runner import Runner


def evaluate_packages(
    packages: Sequence[Path], checkpoint: Checkpoint, text: Path | None, progress: Progress
) -> list[Fidelity]:
    """Compare packages, or model folders of onnxruntime-genai, with one checkpoint.

    Args:
        packages: Directories with a model and ``tokenizer.json``.
        checkpoint: What they were built from.
        text: A UTF-8 file, or None for the text that comes with the builder.
        progress: Hears of the work.

    Raises:
        ConfigError: If the text cannot be read, is not UTF-8, or too short.
        BuildError: If a package has another vocabulary than the reference, or onnxruntime cannot load it.
        MissingFileError: If a package lacks a file.
        PackageError: If its tokenizer or its manifest cannot be read.
    """
    if len(set(packages)) < len(packages):
        raise ConfigError("a package is named twice", hint="name each once")
    loaders = [_loader(package) for package in packages]
    vocab_size = checkpoint.config.integer("vocab_size")
    files = checkpoint.tokenizer().within(vocab_size)
    tokenizer = load_tokenizer(files, vocab_size)
    for package in packages:
        _check_vocabulary(package, tokenizer, checkpoint)
    context = checkpoint.config.integer("max_position_embeddings")
    windows = evaluation_windows(tokenizer, text, context)
    generation = generation_defaults(checkpoint.generation_config, checkpoint.config, tokenizer, files.special_tokens)
    prompts = [encode_prompt(prompt, tokenizer, _chat_format(files)) for prompt in PROMPTS]
    answers = [
        generate_answers(load(), prompts, frozenset(generation.eos_token_ids), context, progress) for load in loaders
    ]
    reference = Reference(checkpoint, windows, [answer for found in answers for answer in found], progress)
    results = []
    for index, load in enumerate(loaders):
        choices = reference.choices[index * len(prompts) : (index + 1) * len(prompts)]
        compared = compare_answers(answers[index], choices)
        results.append(reference.compare(load(), compared, _cache_scales(packages[index]), progress))
    return results


def _loader(package: Path) -> Callable[[], Runner]:
    """Return what loads the model of a package, or of a model folder, which names it itself."""
    if (package / GENAI_CONFIG_NAME).is_file() and not (package / MANIFEST_NAME).is_file():
        folder = read_genai_folder(package)
        heads = folder.decoder.integer("num_key_value_heads"), folder.decoder.integer("head_size")
        return lambda: Runner(folder.model_path, cache_heads=heads)
    if not (package / MODEL_NAME).is_file():
        raise MissingFileError(f"{package}: there is no {MODEL_NAME}", hint="give the directory of a package")
    return lambda: Runner(package / MODEL_NAME)


def _cache_scales(package: Path) -> CacheScales | None:
    """Return the scales of a package's 8-bit cache; None where it has none, or is a model folder.

    Raises:
        PackageError: If its manifest cannot be read.
    """
    return read_manifest(package).cache_scales if (package / MANIFEST_NAME).is_file() else None


def _check_vocabulary(package: Path, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Compare a package's tokenizer with the reference's.

    Raises:
        BuildError: If they give a text other tokens.
        MissingFileError: If there is none.
        PackageError: If it cannot be read.
    """
    path = package / TOKENIZER_NAME
    if not path.is_file():
        raise MissingFileError(f"{package}: there is no {TOKENIZER_NAME}", hint="give the directory of a package")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception for every parse error
        raise PackageError(f"{path}: cannot be read as a tokenizer: {error}") from error
    text = "".join(held_out_texts())
    if found.encode(text, add_special_tokens=False).ids != tokenizer.encode(text, add_special_tokens=False).ids:
        raise BuildError(
            f"{package}: has another vocabulary than the reference {checkpoint.path}, so they cannot be compared",
            hint="give the checkpoint that the package was built from",
        )


def _chat_format(files: TokenizerFiles) -> ChatFormat | None:
    """Return the reference's chat format; None where it has none that can be compiled, and prompts stay as they are."""
    if files.chat_template is None:
        return None
    try:
        return compile_chat_template(files.chat_template, files.special_tokens)
    except ChatTemplateError:
        return None
