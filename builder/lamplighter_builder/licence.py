"""Licences as checkpoints state them, and as SPDX expressions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_SPDX: Final[Mapping[str, str]] = MappingProxyType(
    {
        "apache-2.0": "Apache-2.0",
        "mit": "MIT",
        "bsd-3-clause": "BSD-3-Clause",
        "cc-by-4.0": "CC-BY-4.0",
        "cc-by-sa-4.0": "CC-BY-SA-4.0",
        "cc-by-nc-4.0": "CC-BY-NC-4.0",
        "openrail": "LicenseRef-OpenRAIL",
        "llama2": "LicenseRef-Llama-2-Community",
        "llama3": "LicenseRef-Llama-3-Community",
        "llama3.1": "LicenseRef-Llama-3.1-Community",
        "llama3.2": "LicenseRef-Llama-3.2-Community",
        "llama3.3": "LicenseRef-Llama-3.3-Community",
        "gemma": "LicenseRef-Gemma",
    }
)


def spdx_licence(stated: str | None) -> str | None:
    """Return the SPDX expression of a licence in a model card's words; None if it is unknown or not stated.

    ``other`` and names that are not in the table are unknown: a person must read the licence and name it.
    """
    return None if stated is None else _SPDX.get(stated.strip().lower())
