"""The manifest parser: what is valid passes unchanged, everything else is a ManifestError that names the place."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.layout import MAX_MANIFEST_BYTES
from lamplighter_agent.package.manifest import Manifest, decode_manifest, encode_manifest, manifest_schema
from support.manifests import manifest_tree

ROOT = Path(__file__).parents[2]


def decode(tree: object) -> Manifest:
    return decode_manifest(json.dumps(tree).encode())


def test_a_valid_manifest_round_trips() -> None:
    manifest = decode(manifest_tree())
    assert manifest.reference == "tiny/1.0.0"
    assert manifest.total_bytes == 30
    assert manifest.file("weights").name == "model.onnx.data"
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_encoding_is_reproducible() -> None:
    assert encode_manifest(decode(manifest_tree())) == encode_manifest(decode(manifest_tree()))


def test_unknown_fields_are_ignored_at_every_level() -> None:
    tree = manifest_tree()
    tree["invented_later"] = {"x": 1}
    tree["files"][0]["invented_later"] = True
    assert decode(tree) == decode(manifest_tree())


def test_a_later_minor_version_is_read() -> None:
    assert decode(manifest_tree() | {"format_version": "1.7"}).name == "tiny"


@pytest.mark.parametrize("version", ["2.0", "0.9", "1", "1.x", "", "x.1", "1.0.0", "-1.0"])
def test_an_unknown_major_version_is_refused(version: str) -> None:
    with pytest.raises(ManifestError, match="format"):
        decode(manifest_tree() | {"format_version": version})


def test_the_major_version_is_checked_before_anything_else() -> None:
    with pytest.raises(ManifestError, match=r"format version 2\.0, but this agent understands 1\.x"):
        decode({"format_version": "2.0", "everything": "is different"})


def _set(path: str, value: object) -> dict[str, Any]:
    tree = manifest_tree()
    node: Any = tree
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("name", "../evil", "package name"),
        ("name", "a/b", "package name"),
        ("version", "..", "package version"),
        ("licence", "  ", "licence is empty"),
        ("files.0.name", "../../etc/passwd", "file name"),
        ("files.0.name", "sub/model.onnx", "file name"),
        ("files.0.name", "manifest.json", "reserved or listed twice"),
        ("files.0.name", "TOKENIZER.json", "reserved or listed twice"),
        ("files.0.sha256", "../x", "sha256"),
        ("files.0.length", -1, "length"),
        ("files.0.length", 2**60, "length"),
        ("files.0.length", 1000, "chunk hashes"),
        ("files.0.length", "10", "length"),
        ("files.0.chunk_bytes", 0, "chunk_bytes"),
        ("files.0.chunk_sha256", ["z" * 64, "1" * 64], "chunk_sha256"),
        ("files.0.role", "weights", "role 'model'"),
        ("files", [], "files"),
        ("files", None, "files"),
        ("model.num_key_value_heads", 3, "no multiple"),
        ("model.vocab_size", 0, "vocab_size"),
        ("cache_scales", {"key": ["AACAPw=="], "value": []}, "cache_scales: key must have"),
        ("model.rope", {"rope_type": "default", "rope_theta": 1e4, "rotary_dim": 7}, "rotary_dim 7 is not an even"),
        (
            "model.rope",
            {"rope_type": "default", "rope_theta": 1e4, "rotary_dim": 4, "inv_freq": [1.0]},
            "inv_freq has 1 entries, but must have 2",
        ),
        ("memory.kv_bytes_per_token", {}, "kv_bytes_per_token is empty"),
        ("memory.kv_bytes_per_token", {"float8": 1}, "float8"),
        ("target.execution_provider", "abacus", "execution_provider"),
        ("generation.eos_token_ids", [256], "outside the vocabulary"),
        (
            "self_tests",
            [{"prompt_tokens": [1], "expected_tokens": [300], "min_matching_tokens": 1}],
            "outside the vocabulary",
        ),
        (
            "self_tests",
            [{"prompt_tokens": [1], "expected_tokens": [2], "min_matching_tokens": 2}],
            "min_matching_tokens",
        ),
    ],
)
def test_a_broken_rule_is_named(path: str, value: object, match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        decode(_set(path, value))


@pytest.mark.parametrize("field", ["name", "version", "licence", "model", "files", "memory", "generation"])
def test_a_missing_field_is_named(field: str) -> None:
    tree = manifest_tree()
    del tree[field]
    with pytest.raises(ManifestError, match=field):
        decode(tree)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"{} {}"],
    ids=["empty", "cut", "list", "null", "not-utf8", "string", "deep-list", "deep-object", "two"],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"origin\.json"):
        decode_manifest(data, origin="origin.json")


def test_an_oversized_manifest_is_refused_unparsed() -> None:
    with pytest.raises(ManifestError, match="at most"):
        decode_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


def test_encoding_refuses_what_decoding_would() -> None:
    manifest = msgspec.structs.replace(decode(manifest_tree()), name="../x")
    with pytest.raises(ManifestError, match="package name"):
        encode_manifest(manifest)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@given(st.binary(max_size=300))
def test_random_bytes_give_a_manifest_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ManifestError):
        decode_manifest(data)


@given(st.sampled_from(sorted(manifest_tree())), _JSON)
def test_a_random_value_in_any_field_is_accepted_or_refused_cleanly(field: str, value: object) -> None:
    with contextlib.suppress(ManifestError):
        assert isinstance(decode(manifest_tree() | {field: value}), Manifest)


def test_the_shipped_schema_is_the_code_s() -> None:
    shipped = (ROOT / "agent" / "manifest.schema.json").read_bytes()
    assert shipped == manifest_schema(), "write it anew: lamplighter-agent schema > agent/manifest.schema.json"
