"""Package directories without a model: random bytes under a valid manifest."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from lamplighter_agent.package.hashing import digest_file
from lamplighter_agent.package.layout import MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest, decode_manifest
from support.graphs import graph_bytes
from support.manifests import manifest_tree

CHUNK_BYTES = 4096
WEIGHTS_BYTES = 25 * CHUNK_BYTES + 100
_ROLES = {MODEL_NAME: "model", WEIGHTS_NAME: "weights", TOKENIZER_NAME: "tokenizer"}


def write_package(
    directory: Path,
    *,
    name: str = "tiny",
    version: str = "1.0.0",
    weights_seed: int = 1,
    weights_bytes: int = WEIGHTS_BYTES,
    graph: bytes = b"",
    change: Callable[[dict[str, Any]], None] = lambda tree: None,
) -> Manifest:
    """Write a package whose weights depend on ``weights_seed`` alone; model and tokenizer are always the same.

    Args:
        directory: Where to; it is created.
        name: Package name.
        version: Package version.
        weights_seed: Seed of the random weights.
        weights_bytes: Their length.
        graph: Content of the graph's file; empty: a valid one.
        change: Alters the manifest's JSON tree before it is written.
    """
    directory.mkdir(parents=True)
    (directory / MODEL_NAME).write_bytes(
        graph or graph_bytes(padding=random.Random("model").randbytes(2 * CHUNK_BYTES))
    )
    (directory / WEIGHTS_NAME).write_bytes(random.Random(weights_seed).randbytes(weights_bytes))
    (directory / TOKENIZER_NAME).write_bytes(b"{}")
    tree = manifest_tree()
    tree["name"], tree["version"] = name, version
    tree["files"] = [file_entry(directory / file, role) for file, role in _ROLES.items()]
    tree["self_tests"] = [{"prompt_tokens": [1, 2], "expected_tokens": [3, 4, 5], "min_matching_tokens": 2}]
    change(tree)
    data = msgspec.json.encode(tree)
    (directory / MANIFEST_NAME).write_bytes(data)
    return msgspec.json.decode(data, type=Manifest)


def file_entry(path: Path, role: str) -> dict[str, Any]:
    """Return the manifest's entry of a file."""
    digest = digest_file(path, CHUNK_BYTES)
    return {
        "name": path.name,
        "role": role,
        "length": digest.length,
        "sha256": digest.sha256,
        "chunk_bytes": CHUNK_BYTES,
        "chunk_sha256": list(digest.chunk_sha256),
    }


def load_manifest(directory: Path) -> Manifest:
    """Return the manifest of a package directory."""
    return decode_manifest((directory / MANIFEST_NAME).read_bytes())
