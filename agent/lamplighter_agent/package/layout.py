"""File names and limits of a package directory. A package is flat: no sub-folders, links or archives."""

from __future__ import annotations

import re
from typing import Final

from lamplighter_agent.errors import ManifestError

MANIFEST_NAME: Final = "manifest.json"
MODEL_NAME: Final = "model.onnx"
WEIGHTS_NAME: Final = "model.onnx.data"
TOKENIZER_NAME: Final = "tokenizer.json"
GENAI_CONFIG_NAME: Final = "genai_config.json"

MAX_MANIFEST_BYTES: Final = 8 * 1024 * 1024
MAX_FILES: Final = 64
CHUNK_BYTES: Final = 1024 * 1024
"""Bytes covered by one chunk hash; the unit that a resumed download loses at most."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it is safe as one path component and one topic level.

    Args:
        name: A package name, version or file name.
        what: How to call it in the error, for example ``"file name"``.

    Raises:
        ManifestError: If it does not match ``[A-Za-z0-9_][A-Za-z0-9._-]{0,127}``.
    """
    if _NAME.fullmatch(name) is None:
        raise ManifestError(
            f"{what} {name[:200]!r} is not allowed",
            hint="use 1 to 128 letters, digits, '.', '_' and '-', and do not begin with '.' or '-'",
        )
    return name


def check_sha256(digest: str, what: str) -> str:
    """Return ``digest`` if it is 64 lower-case hex digits; it becomes part of a path.

    Raises:
        ManifestError: If it is anything else.
    """
    if _SHA256.fullmatch(digest) is None:
        raise ManifestError(f"{what}: {digest[:80]!r} is not a sha256 in lower-case hex")
    return digest
