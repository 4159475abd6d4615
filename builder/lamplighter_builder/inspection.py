"""What is in a package, for people and scripts."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lamplighter_agent.errors import ManifestError, MissingFileError
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.package.manifest import decode_manifest


def inspect_package(package: Path) -> dict[str, object]:
    """Return the facts of a package: what its manifest says, and the operators of its graph.

    Raises:
        MissingFileError: If there is no manifest or no model.
        ManifestError: If the manifest or the model cannot be read.
    """
    path = package / MANIFEST_NAME
    if not path.is_file():
        raise MissingFileError(f"{package}: there is no {MANIFEST_NAME}", hint="give the directory of a package")
    manifest = decode_manifest(path.read_bytes(), origin=str(path))
    model = package / manifest.file("model").name
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except FileNotFoundError as error:
        raise MissingFileError(f"{model}: the manifest lists it, but there is no such file") from error
    except DecodeError as error:
        raise ManifestError(f"{model}: no ONNX model: {error}") from error
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "package": manifest.reference,
        "licence": manifest.licence,
        "model_type": manifest.model.model_type,
        "parameters": manifest.model.parameters,
        "execution_provider": manifest.target.execution_provider,
        "precision": {group.name: f"{group.dtype}/{group.block_size or '-'}" for group in manifest.precision.groups},
        "files": {entry.name: entry.length for entry in manifest.files},
        "total_bytes": manifest.total_bytes,
        "weights_bytes": manifest.memory.weights_bytes,
        "kv_bytes_per_token": dict(manifest.memory.kv_bytes_per_token),
        "chat_format": manifest.chat_format is not None,
        "self_tests": len(manifest.self_tests),
        "operators": dict(sorted(operators.items())),
        "source": manifest.provenance.source,
    }
