"""The rules of a manifest that types cannot express."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.layout import MANIFEST_NAME, check_name, check_sha256

if TYPE_CHECKING:
    from lamplighter_agent.package.manifest import CacheScales, FileEntry, Manifest, ModelFacts, RopeScaling


def check_manifest(manifest: Manifest) -> None:
    """Apply the rules that types cannot express.

    Raises:
        ManifestError: Naming the field and the value.
    """
    check_name(manifest.name, "package name")
    check_name(manifest.version, "package version")
    if not manifest.licence.strip():
        raise ManifestError("licence is empty", hint="give an SPDX expression, or 'LicenseRef-…' with a notice file")
    _check_files(manifest.files)
    model = manifest.model
    if model.num_attention_heads % model.num_key_value_heads:
        raise ManifestError(
            f"num_attention_heads {model.num_attention_heads} is no multiple of "
            f"num_key_value_heads {model.num_key_value_heads}"
        )
    for rope in (model.rope, model.local_rope):
        if rope is not None:
            _check_rope(rope, model.head_dim)
    if not manifest.memory.kv_bytes_per_token:
        raise ManifestError("memory.kv_bytes_per_token is empty")
    if manifest.cache_scales is not None:
        _check_scales(manifest.cache_scales, model)
    for role in ("model", "weights", "tokenizer"):
        found = sum(entry.role == role for entry in manifest.files)
        if found != 1:
            raise ManifestError(f"{found} files have the role {role!r}, but there must be exactly one")
    for test in manifest.self_tests:
        if test.min_matching_tokens > len(test.expected_tokens):
            raise ManifestError("self_tests: min_matching_tokens is larger than the number of expected_tokens")
        if max(max(test.prompt_tokens), max(test.expected_tokens)) >= model.vocab_size:
            raise ManifestError(f"self_tests: a token id is outside the vocabulary of {model.vocab_size}")
    for token in manifest.generation.eos_token_ids:
        if token >= model.vocab_size:
            raise ManifestError(f"generation: eos token id {token} is outside the vocabulary of {model.vocab_size}")


def _check_rope(rope: RopeScaling, head_dim: int) -> None:
    if rope.rotary_dim % 2 or rope.rotary_dim > head_dim:
        raise ManifestError(f"rope: rotary_dim {rope.rotary_dim} is not an even number up to head_dim {head_dim}")
    if rope.inv_freq is not None and (
        len(rope.inv_freq) != rope.rotary_dim // 2 or not all(map(math.isfinite, rope.inv_freq))
    ):
        raise ManifestError(
            f"rope: inv_freq has {len(rope.inv_freq)} entries, but must have {rope.rotary_dim // 2} finite ones"
        )


def _check_scales(scales: CacheScales, model: ModelFacts) -> None:
    channels = model.num_key_value_heads * model.head_dim
    for name, layers in (("key", scales.key), ("value", scales.value)):
        if len(layers) != model.num_hidden_layers or any(len(layer) != 4 * channels for layer in layers):
            raise ManifestError(
                f"cache_scales: {name} must have {channels} float32 scales for each of {model.num_hidden_layers} layers"
            )
        for layer in layers:
            if not all(0.0 < scale < math.inf for scale in struct.unpack(f"<{channels}f", layer)):
                raise ManifestError(f"cache_scales: {name} has a scale that is not positive and finite")


def _check_files(files: tuple[FileEntry, ...]) -> None:
    seen: set[str] = set()
    for entry in files:
        check_name(entry.name, "file name")
        if entry.name.lower() == MANIFEST_NAME or entry.name.lower() in seen:
            raise ManifestError(f"file name {entry.name!r} is reserved or listed twice")
        seen.add(entry.name.lower())
        check_sha256(entry.sha256, f"files: {entry.name}")
        chunks = -(-entry.length // entry.chunk_bytes)
        if entry.chunk_sha256 and len(entry.chunk_sha256) != chunks:
            raise ManifestError(
                f"files: {entry.name} has {len(entry.chunk_sha256)} chunk hashes, but {entry.length} bytes in chunks "
                f"of {entry.chunk_bytes} make {chunks}"
            )
        for digest in entry.chunk_sha256:
            check_sha256(digest, f"files: {entry.name}, chunk_sha256")
