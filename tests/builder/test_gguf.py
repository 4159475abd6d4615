from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.gguf import GgufCheckpoint
from support.gguf_files import write_gguf
from support.tiny_model import tiny_tokenizer

TEXTS = [
    "Hello, world! It's a test of 1234567890 and 3.14159e-10, isn't it?",
    "  leading spaces\n\n\tand\ttabs \r\n trailing   ",
    "Zwölf Boxkämpfer \u2013 “quotes” … naïve façade Ünïcödé",
    "漢字とかな交じり文 한국어 العربية עברית 🙂👩‍👩‍👧",
    "def f(x):\n    return {'a': [x**2 for x in range(10)], 'b': None}\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <repo_name> <|im_start",
    "a" * 300 + " " * 40 + "\n" * 5,
    "\u00a0\u200b\ufeff\x00\x7f",
    "",
]


def test_weights_come_back_in_hugging_faces_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    original = HuggingFaceCheckpoint(tiny_checkpoint)
    converted = GgufCheckpoint(write_gguf(tmp_path / "tiny.gguf", original))
    assert converted.tensors.keys() == original.tensors.keys()
    for name in original.tensors:
        np.testing.assert_array_equal(converted.read(name), original.read(name), err_msg=name)
    assert converted.licence == "mit"
    assert converted.config.flag("tie_word_embeddings")


def test_tokenizer_comes_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "tiny.gguf", HuggingFaceCheckpoint(tiny_checkpoint)))
    found, original = Tokenizer.from_str(checkpoint.tokenizer().tokenizer_json.decode()), tiny_tokenizer()
    for text in TEXTS:
        assert found.encode(text).ids == original.encode(text).ids
        assert found.decode(found.encode(text).ids) == original.decode(original.encode(text).ids)


def test_other_architecture_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", HuggingFaceCheckpoint(tiny_checkpoint), architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        GgufCheckpoint(path)


def test_unknown_pre_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", HuggingFaceCheckpoint(tiny_checkpoint), pre="novel")
    with pytest.raises(UnsupportedModelError, match="'novel'"):
        GgufCheckpoint(path).tokenizer()


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_file_that_was_cut_is_refused(tiny_checkpoint: Path, tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "x.gguf", HuggingFaceCheckpoint(tiny_checkpoint))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        GgufCheckpoint(path)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufCheckpoint(tmp_path / "x.gguf")


@pytest.mark.smollm2
def test_real_weights_equal_those_that_transformers_reads(smollm2_gguf: Path, smollm2_model: PreTrainedModel) -> None:
    checkpoint = GgufCheckpoint(smollm2_gguf)
    expected = {name: values for name, values in smollm2_model.state_dict().items() if name != "lm_head.weight"}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), values.numpy(), err_msg=name)


@pytest.mark.smollm2
def test_real_tokenizer_equals_the_one_that_transformers_makes(smollm2_gguf: Path) -> None:
    files = GgufCheckpoint(smollm2_gguf).tokenizer()
    found = Tokenizer.from_str(files.tokenizer_json.decode())
    expected = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert files.chat_template == expected.chat_template
    for text in TEXTS:
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids)


@pytest.mark.smollm2
def test_real_tokenizer_cuts_numerals_one_by_one(smollm2_gguf: Path) -> None:
    """The pre-tokenizer 'smollm' splits every numeral off, ½ as well as 7; transformers leaves that out for GGUF."""
    found = Tokenizer.from_str(GgufCheckpoint(smollm2_gguf).tokenizer().tokenizer_json.decode())
    space = found.token_to_id("Ġ")
    for text in (" 7", " ½", " Ⅷ"):
        assert found.encode(text).ids[0] == space
