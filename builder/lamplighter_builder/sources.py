"""Where a build's inputs come from: the meaning of ``-m``, names made from it, chat format files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from lamplighter_agent.errors import CheckpointError, ConfigError
from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_builder.adapter import AdaptedCheckpoint
from lamplighter_builder.checkpoint import Checkpoint, HuggingFaceCheckpoint
from lamplighter_builder.gguf import GgufCheckpoint
from lamplighter_builder.hub import HubId, download
from lamplighter_builder.text_part import TEXT_DEFAULTS, TextPart

_QUANTIZATION_SUFFIX: Final = re.compile(r"[._-]((i?q\d+(_\w+)?)|f16|f32|bf16|fp16|fp32)$", re.IGNORECASE)


def open_checkpoint(model: str, cache: Path | None, adapter: Path | None = None) -> Checkpoint:
    """Open what ``-m`` names, with the adapter that ``--adapter`` names.

    Args:
        model: A directory, a GGUF file, or a hub id; see ``hub.py``.
        cache: Directory for downloads, or None for the hub client's own.
        adapter: Directory of a LoRA adapter, or None.

    Raises:
        CheckpointError: If it is damaged, or cannot be downloaded.
        ConfigError: If there is no such file and it is no hub id.
        UnsupportedModelError: If the kind of file, adapter or architecture is not supported.
        WeightMismatchError: If the adapter does not belong to the model.
    """
    base = _text_part(_open_model(model, cache))
    return base if adapter is None else AdaptedCheckpoint(base, adapter)


def _open_model(model: str, cache: Path | None) -> Checkpoint:
    path = Path(model)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: no GGUF file", hint="give a model directory or a file named *.gguf")
        return GgufCheckpoint(path)
    hub_id = HubId.parse(model)
    if hub_id is None:
        raise ConfigError(f"{model}: no such file or directory, and no hub id either")
    found = download(hub_id, cache)
    if hub_id.file is None:
        return HuggingFaceCheckpoint(found.path, name=hub_id.name, source=found.source)
    return GgufCheckpoint(found.path, name=hub_id.name, source=found.source)


def _text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Return the language model of a checkpoint that is more than that."""
    model_type = checkpoint.config.text("model_type", default="")
    return TextPart(checkpoint) if model_type in TEXT_DEFAULTS else checkpoint


def default_name(stem: str, precision: str, execution_provider: str = "cpu") -> str:
    """Return a package name made from the model's name, the precision and a provider other than the CPU."""
    provider = "" if execution_provider == "cpu" else f"-{execution_provider}"
    return f"{package_name(_QUANTIZATION_SUFFIX.sub('', stem))}-{precision}{provider}"


def package_name(text: str) -> str:
    """Return the nearest name that a package may have."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "model"


def read_chat_format(path: Path) -> ChatFormat:
    """Read a chat format from a JSON file of the manifest's form.

    Raises:
        ConfigError: If it cannot be read, is not of that form or has a field of another name.
    """
    try:
        given = path.read_bytes()
        found = msgspec.json.decode(given, type=ChatFormat)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no chat format: {error}") from error
    _check_names(msgspec.json.decode(given, type=dict[str, Any]), found, str(path))
    return found


def _check_names(given: Mapping[str, Any], found: Mapping[str, Any] | msgspec.Struct, where: str) -> None:
    """Refuse fields that mean nothing: in a file written by hand they are slips.

    Raises:
        ConfigError: If there is one.
    """
    known = msgspec.structs.asdict(found) if isinstance(found, msgspec.Struct) else found
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{where}: no chat format has {name!r}", hint=f"it may have {', '.join(known)}")
        if isinstance(value, dict):
            _check_names(value, known[name], f"{where}: {name}")
