"""Parts of a manifest that every way to a package fills in alike."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

import onnx
from tokenizers import Tokenizer

from lamplighter_agent.errors import CheckpointError, ConfigError, ManifestError
from lamplighter_agent.package.layout import check_name
from lamplighter_agent.package.manifest import GenerationDefaults, Provenance
from lamplighter_builder import __version__
from lamplighter_builder.checkpoint import TokenizerFiles
from lamplighter_builder.fields import Fields
from lamplighter_builder.progress import Progress

_TOOLS: Final = ("numpy", "onnx", "onnxruntime", "tokenizers", "gguf", "jinja2")


def check_reference(name: str, version: str) -> None:
    """Check name and version before any work is done.

    Raises:
        ConfigError: If one of them is not allowed.
    """
    try:
        check_name(name, "package name")
        check_name(version, "package version")
    except ManifestError as error:
        raise ConfigError(error.message, hint=error.hint) from error


def operator_domains(model: onnx.ModelProto) -> dict[str, int]:
    """Return the operator domains of a model and their versions, as the manifest names them."""
    return {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}


def load_tokenizer(files: TokenizerFiles, vocab_size: int) -> Tokenizer:
    """Load ``tokenizer.json`` and compare it with the embedding.

    Raises:
        CheckpointError: If it cannot be read, or has ids that the embedding lacks.
    """
    tokenizer = files.load()
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < vocab_size:
        raise CheckpointError(f"{files.origin}: has ids up to {highest}, but the embedding has {vocab_size} rows")
    return tokenizer


def generation_defaults(generation: Fields, config: Fields, tokenizer: Tokenizer) -> GenerationDefaults:
    """Read end tokens and sampling defaults; what ``generation`` lacks of the tokens is looked for in ``config``.

    Raises:
        CheckpointError: If there is no end token, or a field is of another type.
    """
    eos = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    if not eos:
        raise CheckpointError(f"eos_token_id is missing in {config.origin}, and in {generation.origin}")
    bos = generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")
    pad = generation.token_ids("pad_token_id") or config.token_ids("pad_token_id")
    return GenerationDefaults(
        eos_token_ids=eos,
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else None,
        add_bos_token=bool(bos) and tokenizer.encode("a").ids[:1] == [bos[0]],
        do_sample=generation.flag("do_sample", default=False),
        temperature=generation.number("temperature", default=1.0),
        top_k=generation.integer("top_k", default=0),
        top_p=generation.number("top_p", default=1.0),
        repetition_penalty=generation.number("repetition_penalty", default=1.0),
    )


def provenance(
    source: str, files: Sequence[Path], options: dict[str, str | int | float | bool | None], progress: Progress
) -> Provenance:
    """Return the source's name, its files with their hashes, tools with their versions, and the options."""
    progress.stage("source hashes", sum(path.stat().st_size for path in files))
    hashes = {}
    for path in files:
        with path.open("rb") as stream:
            hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        progress.advance(path.stat().st_size)
    tools = {name: installed_version(name) for name in _TOOLS}
    return Provenance(
        source=source,
        source_sha256=hashes,
        tools={"lamplighter-builder": __version__, "python": platform.python_version(), **tools},
        options=options,
    )
