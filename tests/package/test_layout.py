"""Names and digests from outside, before any path is built from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.layout import check_name, check_sha256


@pytest.mark.parametrize("name", ["model.onnx", "a", "SmolLM2-135M", "_x", "0.1.0", "a" * 128])
def test_safe_names_pass(name: str) -> None:
    assert check_name(name, "file name") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", ".hidden", "-rf", "a\0b", "a b", "é", "a\n", "a" * 129, "a:b"]
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="file name"):
        check_name(name, "file name")


@given(st.text())
def test_a_name_that_passes_is_one_harmless_path_component(name: str) -> None:
    try:
        check_name(name, "file name")
    except ManifestError:
        return
    assert name not in {".", ".."}
    assert not set(name) & set('/\\\0:*?"<>| \n\t+#')


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61, "\u0660" * 64])
def test_digests_that_are_not_hex_are_refused(digest: str) -> None:
    with pytest.raises(ManifestError, match="sha256"):
        check_sha256(digest, "files: model.onnx")
