"""Packages are model folders of onnxruntime-genai: the same tokens, the same tokenizer, the same chat text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.package.manifest import Manifest, decode_manifest
from lamplighter_builder.precision import PrecisionName
from support.tiny_model import build_tiny_package

pytestmark = pytest.mark.genai
og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


def manifest_of(package: Path) -> Manifest:
    return decode_manifest((package / "manifest.json").read_bytes())


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "untied_checkpoint"])
@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
def test_greedy_tokens_are_the_self_tests(
    checkpoint: str, precision: PrecisionName, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    package = build_tiny_package(request.getfixturevalue(checkpoint), tmp_path / "package", precision)
    model = og.Model(str(package))
    for test in manifest_of(package).self_tests:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(test.prompt_tokens) + 64, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(list(test.prompt_tokens))
        found = []
        for _ in test.expected_tokens:
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert tuple(found) == test.expected_tokens


def test_tokenizer_and_chat_text_are_ours(tiny_int4: Path) -> None:
    model = og.Model(str(tiny_int4))
    theirs, ours = og.Tokenizer(model), Tokenizer.from_file(str(tiny_int4 / "tokenizer.json"))
    chat_format = manifest_of(tiny_int4).chat_format
    assert chat_format is not None
    messages = [ChatMessage("user", "What is 12 + 34?"), ChatMessage("assistant", "46"), ChatMessage("user", "Ok.")]
    text = "".join(segment.text for segment in chat_format.render(messages))
    plain = json.dumps([{"role": message.role, "content": message.content} for message in messages])
    assert theirs.apply_chat_template(plain, add_generation_prompt=True) == text
    assert theirs.encode(text).tolist() == ours.encode(text, add_special_tokens=False).ids
