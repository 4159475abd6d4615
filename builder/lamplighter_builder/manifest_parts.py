"""Parts of a manifest that every way to a package fills in alike."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnx
from tokenizers import Tokenizer

from lamplighter_agent.errors import CheckpointError, ConfigError, ManifestError
from lamplighter_agent.package.layout import check_name
from lamplighter_agent.package.manifest import GenerationDefaults, Provenance
from lamplighter_agent.text import printable
from lamplighter_builder import __version__
from lamplighter_builder.checkpoint import TokenizerFiles
from lamplighter_builder.fields import Fields
from lamplighter_builder.progress import Progress

_LEAST_SHARE: Final = 1e-6
_MOST_MIN_P: Final = 1 - 1e-6
_UNUSED_SAMPLING: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "no_repeat_ngram_size": (0,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "encoder_repetition_penalty": (1,),
        "exponential_decay_length_penalty": (),
        "top_h": (),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "xtc_probability": (0,),
        "mirostat": (0,),
        "num_beams": (0, 1),
        "penalty_alpha": (0,),
        "guidance_scale": (1,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "stop_strings": (),
        "bad_words_ids": (),
        "force_words_ids": (),
        "sequence_bias": (),
        "suppress_tokens": (),
        "begin_suppress_tokens": (),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
    }
)
"""Options of a checkpoint that change its text and have no place in the manifest, with the values that do nothing."""

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


def generation_defaults(
    generation: Fields, config: Fields, tokenizer: Tokenizer, special_tokens: Mapping[str, str]
) -> GenerationDefaults:
    """Read end tokens and sampling defaults.

    What ``generation`` lacks of the tokens is looked for in ``config``, which also has ``vocab_size``; an end token
    that neither names, in ``special_tokens``.

    Raises:
        CheckpointError: If there is no end token, or a field is of another type or out of range.
    """
    eos = _token_ids("eos_token_id", generation, config)
    if not eos:
        named = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
        if named is None:
            raise CheckpointError(f"eos_token_id is missing in {config.origin}, and in {generation.origin}")
        eos = (named,)
    bos, pad = _token_ids("bos_token_id", generation, config), _token_ids("pad_token_id", generation, config)
    return GenerationDefaults(
        eos_token_ids=eos,
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else None,
        add_bos_token=bool(bos) and tokenizer.encode("a").ids[:1] == [bos[0]],
        do_sample=generation.flag("do_sample", default=False),
        temperature=_within(generation, "temperature"),
        # Some write -1 for all tokens.
        top_k=max(generation.integer("top_k", default=0), 0),
        # And 0 for the likeliest token alone, which the smallest share above it is too.
        top_p=_within(generation, "top_p", 1.0) or _LEAST_SHARE,
        min_p=_within(generation, "min_p", _MOST_MIN_P, default=0.0),
        typical_p=_within(generation, "typical_p", 1.0) or _LEAST_SHARE,
        repetition_penalty=generation.positive("repetition_penalty", default=1.0),
    )


def warn_of_unused_sampling(generation: Fields, progress: Progress) -> None:
    """Name what changes the text in a ``generation_config.json`` and has no place in a manifest."""
    for key, neutral in _UNUSED_SAMPLING.items():
        value = generation.values.get(key)
        if value not in (None, False, "", [], {}, *neutral):
            progress.warn(f"{generation.origin}: {key} {str(value)[:60]} is not kept: packages have no default for it")


def _token_ids(key: str, generation: Fields, config: Fields) -> tuple[int, ...]:
    """Read a token id or several from the first of both that has them; early configs write -1 for none."""
    owner = next((fields for fields in (generation, config) if fields.values.get(key) not in (None, -1)), None)
    if owner is None:
        return ()
    found, rows = owner.token_ids(key), config.integer("vocab_size")
    if found and max(found) >= rows:
        raise CheckpointError(f"{owner.origin}: {key} is {max(found)}, but the embedding has {rows} rows")
    return found


def _within(fields: Fields, key: str, most: float = math.inf, *, default: float = 1.0) -> float:
    """Read a number from 0 to ``most``, ``default`` if it is missing."""
    value = fields.number(key, default=default)
    if not 0 <= value <= most:
        raise CheckpointError(f"{fields.origin}: {key} is {value:g}, but must be from 0 to {most:g}")
    return value


def provenance(
    source: str, files: Sequence[Path], options: dict[str, str | int | float | bool | None], progress: Progress
) -> Provenance:
    """Return the source's name, its files with their hashes, tools with their versions, and the options."""
    progress.stage("source hashes", sum(path.stat().st_size for path in files))
    hashes = {}
    for path in files:
        with path.open("rb") as stream:
            hashes[printable(path.name)] = hashlib.file_digest(stream, "sha256").hexdigest()
        progress.advance(path.stat().st_size)
    tools = {name: installed_version(name) for name in _TOOLS}
    return Provenance(
        source=printable(source),
        source_sha256=hashes,
        tools={"lamplighter-builder": __version__, "python": platform.python_version(), **tools},
        options=options,
    )
