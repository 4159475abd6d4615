"""From ``config.json``'s ``model_type`` to the file in ``models/`` that knows it, imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from lamplighter_agent.errors import UnsupportedModelError
from lamplighter_builder.models.decoder import Architecture

_FAMILIES: Final = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
)
MODEL_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {**{name: name for name in _FAMILIES}, "ministral": "mistral"}
)


def find_architecture(model_type: str) -> Architecture[Any]:
    """Return the architecture of a ``model_type``.

    Raises:
        UnsupportedModelError: If there is none.
    """
    module = MODEL_MODULES.get(model_type)
    if module is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported", hint=f"supported are: {', '.join(sorted(MODEL_MODULES))}"
        )
    architecture = importlib.import_module(f"lamplighter_builder.models.{module}").ARCHITECTURE
    if not isinstance(architecture, Architecture):
        raise TypeError(f"lamplighter_builder.models.{module}.ARCHITECTURE is {architecture!r}")
    return architecture
