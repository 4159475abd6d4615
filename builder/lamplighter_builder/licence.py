"""Licences as checkpoints state them, and as SPDX expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from lamplighter_agent.package.manifest import UNKNOWN_LICENCE

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


def spdx_licence(stated: str | None) -> str:
    """Return the SPDX expression of a licence in a model card's words.

    A name that is not in the table becomes a reference of its own (``LicenseRef-bigscience-bloom-rail-1.0``); none, and
    ``other``, which says only that there is one, are ``UNKNOWN_LICENCE``.
    """
    name = "" if stated is None else re.sub(r"[^A-Za-z0-9.-]+", "-", stated.strip()).strip("-.")
    if name.lower() in ("", "other", "unknown"):
        return UNKNOWN_LICENCE
    return _SPDX.get(name.lower(), f"LicenseRef-{name}")
