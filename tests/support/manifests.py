"""A small valid manifest that a test changes in one place."""

from __future__ import annotations

import copy
from typing import Any

_FILE = {"length": 10, "sha256": "0" * 64, "chunk_bytes": 8, "chunk_sha256": ["1" * 64, "2" * 64]}

_MANIFEST: dict[str, Any] = {
    "format_version": "1.0",
    "name": "tiny",
    "version": "1.0.0",
    "licence": "Apache-2.0",
    "model": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": 128,
    },
    "precision": {"name": "int4"},
    "target": {"execution_provider": "cpu"},
    "files": [
        {"name": "model.onnx", "role": "model", **_FILE},
        {"name": "model.onnx.data", "role": "weights", **_FILE},
        {"name": "tokenizer.json", "role": "tokenizer", **_FILE},
    ],
    "memory": {"weights_bytes": 1000, "kv_bytes_per_token": {"float32": 512}, "prefill_scratch_bytes": 1000},
    "generation": {"eos_token_ids": [0]},
    "provenance": {"source": "a test"},
}


def manifest_tree() -> dict[str, Any]:
    """Return a fresh copy of a valid manifest as plain JSON types."""
    return copy.deepcopy(_MANIFEST)
