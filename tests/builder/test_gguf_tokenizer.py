"""Vocabularies of GGUF files encode as the tokenizers that they were converted from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.fields import Fields
from lamplighter_builder.gguf_tokenizer import tokenizer_json
from lamplighter_builder.gguf_vocabulary import GgufVocabulary
from support.tiny_model import tiny_tokenizer

CORPUS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[2].glob("*.md"))]
ALPHABET = [
    *"aeinrst  .,'\n\t",
    "The",
    " the",
    "  ",
    "ing",
    "123",
    "½",
    "é",
    "e\u0301",
    "漢字",
    "🙂",
    "<table>",
    "\u00a0",
]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30
)


def load(metadata: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    fields = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    vocabulary = GgufVocabulary.from_metadata(Fields({"general.architecture": architecture} | fields, "x.gguf"))
    return Tokenizer.from_str(tokenizer_json(vocabulary).decode())


class Sentencepiece:
    """A trained SentencePiece model, its vocabulary in a GGUF file's words, and the tokenizer made of that."""

    def __init__(self, proto: bytes, encode: Callable[[str], list[int]], metadata: dict[str, Any]) -> None:
        self.proto, self.encode, self.metadata = proto, encode, metadata
        self.tokenizer = load(metadata)


def train_sentencepiece(*, prefix: bool, user_defined: tuple[str, ...]) -> Sentencepiece:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.splitlines()]),
        model_writer=model,
        vocab_size=1200,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        user_defined_symbols=list(user_defined),
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.get_piece_size())
    kinds = [
        2 if processor.is_unknown(i)
        else 3 if processor.is_control(i)
        else 6 if processor.is_byte(i)
        else 4 if processor.id_to_piece(i) in user_defined
        else 1
        for i in ids
    ]  # fmt: skip
    texts = [processor.id_to_piece(i) for i in ids]
    metadata = {
        "model": "llama",
        "tokens": [text.replace("\u2581", " ") if kind == 4 else text for text, kind in zip(texts, kinds, strict=True)],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": kinds,
        "unknown_token_id": processor.unk_id(),
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "add_space_prefix": prefix,
    }
    return Sentencepiece(model.getvalue(), processor.encode, metadata)


@pytest.fixture(scope="module")
def llama() -> Sentencepiece:
    """As Llama 2 and TinyLlama: a space before every text."""
    return train_sentencepiece(prefix=True, user_defined=())


@pytest.fixture(scope="module")
def gemma() -> Sentencepiece:
    """As Gemma: no space before a text, runs of spaces and lines and some tags as tokens of their own."""
    runs = tuple("\u2581" * length for length in range(2, 9))
    return train_sentencepiece(prefix=False, user_defined=("<table>", "\n\n", "\n\n\n", *runs))


@settings(max_examples=300)
@given(text=TEXTS)
def test_llama_vocabulary_encodes_as_sentencepiece(llama: Sentencepiece, text: str) -> None:
    found = llama.tokenizer
    ids = found.encode(text, add_special_tokens=False).ids
    assert ids == llama.encode(text)
    assert found.decode(ids) == text


@settings(max_examples=300)
@given(text=TEXTS)
def test_gemma_vocabulary_encodes_as_sentencepiece(gemma: Sentencepiece, text: str) -> None:
    found = gemma.tokenizer
    ids = found.encode(text, add_special_tokens=False).ids
    assert ids == gemma.encode(text)
    assert found.decode(ids) == text


def test_llama_vocabulary_encodes_as_transformers_does(llama: Sentencepiece, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama.proto)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    expected = LlamaTokenizer.from_pretrained(tmp_path)
    # transformers 5 puts no space before a text that begins with one; SentencePiece does.
    for text in [*CORPUS, "two  spaces", "漢字 🙂", ""]:
        assert llama.tokenizer.encode(text, add_special_tokens=False).ids == expected.encode(
            text, add_special_tokens=False
        )


def test_space_is_put_before_each_run_between_special_tokens(llama: Sentencepiece) -> None:
    """As the published tokenizer.json of Llama 2 does, and llama.cpp."""
    bos, turn = llama.tokenizer.token_to_id("<s>"), llama.encode("The")
    assert llama.tokenizer.encode("The<s>The").ids == [bos, *turn, bos, *turn]


def test_control_tokens_of_phi3_take_the_space_behind_them(llama: Sentencepiece) -> None:
    metadata = with_token(llama.metadata, "<|user|>") | {"bos_token_id": None}
    user = len(llama.metadata["tokens"])
    for architecture, expected in (("phi3", llama.encode("The")), ("llama", llama.encode("\nThe"))):
        assert load(metadata, architecture).encode("<|user|>\nThe").ids == [user, *expected]


def test_mistral_turns_are_not_followed_by_a_second_space(llama: Sentencepiece) -> None:
    metadata = with_token(llama.metadata, "[INST]")
    bos, turn = 1, len(llama.metadata["tokens"])
    assert load(metadata).encode("[INST] The").ids == [bos, turn, *llama.encode("The")]


def test_content_that_spells_a_control_token_never_becomes_one(llama: Sentencepiece) -> None:
    """Merges never make a control token, so that text read with special tokens off stays text."""
    metadata = with_token(llama.metadata, "the")
    tokenizer = load(metadata)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("xthe", add_special_tokens=False).ids
    assert ids == llama.encode("xthe")


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_first_token_is_added_as_the_file_says(llama: Sentencepiece, add_bos: bool | None) -> None:
    tokenizer = load(llama.metadata | {"add_bos_token": add_bos})
    assert tokenizer.encode("The").ids == [1, *llama.encode("The")][0 if add_bos is not False else 1 :]


def byte_level(pre: str) -> dict[str, Any]:
    model = json.loads(tiny_tokenizer().to_str())["model"]
    vocabulary = sorted(model["vocab"].items(), key=lambda item: item[1])
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [text for text, _ in vocabulary],
        "token_type": [3 if text.startswith("<|") else 1 for text, _ in vocabulary],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("pre", "reference"), [("qwen2", Qwen2Tokenizer), ("phi-2", GPT2Tokenizer), ("gpt-2", GPT2Tokenizer)]
)
def test_byte_level_vocabulary_encodes_as_transformers_does(
    pre: str, reference: type[Qwen2Tokenizer | GPT2Tokenizer]
) -> None:
    metadata, model = byte_level(pre), json.loads(tiny_tokenizer().to_str())["model"]
    merges: list[Any] = [tuple(pair) for pair in model["merges"]]
    expected, found = reference(vocab=model["vocab"], merges=merges), load(metadata)

    @settings(max_examples=200)
    @given(text=TEXTS)
    def compare(text: str) -> None:
        assert found.encode(text).ids == expected.encode(text)

    compare()
    assert found.encode("e\u0301").ids == expected.encode("e\u0301")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "It's 12345 HelloWorld\n\n  x", ["It", "'s", " ", "123", "45", " HelloWorld", "\n\n", " ", " x"]),
        ("dbrx", "WE'LL 12345!?\n", ["WE", "'LL", " ", "123", "45", "!?\n"]),
        ("qwen2", "a1234 (b)", ["a", "1", "2", "3", "4", " (", "b", ")"]),
        ("deepseek-r1-qwen", "a12 b", ["a", "1", "2", " b"]),
        ("gpt-4o", "HelloWorld it's 12345 x/\n", ["Hello", "World", " it's", " ", "123", "45", " x", "/\n"]),
        ("tekken", "HelloWORLD it's 12", ["Hello", "WORLD", " it", "'s", " ", "1", "2"]),
        ("smollm", "a12 b", ["a", "1", "2", " b"]),
        ("default", "it's 12", ["it", "'s", " 12"]),
    ],
)
def test_text_is_cut_as_the_family_cuts_it(pre: str, text: str, pieces: list[str]) -> None:
    cut = load(byte_level(pre)).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_llama3_takes_a_piece_that_is_a_token_without_merges() -> None:
    metadata = byte_level("llama-bpe")
    metadata["tokens"].append("xqz")
    metadata["token_type"].append(1)
    assert load(metadata).encode("xqz").ids == [len(metadata["tokens"]) - 1]
    assert len(load(metadata | {"pre": "qwen2"}).encode("xqz").ids) == 3


def test_control_tokens_that_end_an_answer_are_found_by_their_texts() -> None:
    fields = {f"tokenizer.ggml.{key}": value for key, value in byte_level("qwen2").items()}
    vocabulary = GgufVocabulary.from_metadata(Fields({"general.architecture": "qwen2"} | fields, "x.gguf"))
    assert vocabulary.end_ids == (2, 0)  # <|im_end|> by its field, <|endoftext|> by its text


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": "rwkv"}, UnsupportedModelError, "tokenizer.ggml.model 'rwkv' is not supported"),
        ({"pre": "novel"}, UnsupportedModelError, "tokenizer.ggml.pre 'novel' is not supported"),
        ({"model": "llama"}, CheckpointError, "tokenizer.ggml.scores is missing"),
        ({"tokens": ["a", "a"], "token_type": None, "eos_token_id": 0}, CheckpointError, "holds a token twice"),
        ({"tokens": None}, CheckpointError, "tokenizer.ggml.tokens is missing"),
        ({"token_type": [1]}, CheckpointError, "tokenizer.ggml.token_type has 1 values for 384 tokens"),
        ({"scores": ["x"] * 384}, CheckpointError, "tokenizer.ggml.scores is no list of numbers"),
        ({"eos_token_id": 384}, CheckpointError, "tokenizer.ggml.eos_token_id is 384, but there are 384 tokens"),
        ({"merges": ["ab"]}, CheckpointError, "tokenizer.ggml.merges has 'ab', which does not join"),
        ({"merges": ["a zzz"]}, CheckpointError, "tokenizer.ggml.merges has 'a zzz', which does not join"),
    ],
)
def test_vocabulary_that_cannot_be_used_is_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        load(byte_level("qwen2") | changes)
    assert "x.gguf" in str(caught.value)


def with_token(metadata: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the metadata with one more control token."""
    return metadata | {
        "tokens": [*metadata["tokens"], text],
        "scores": [*metadata["scores"], -1000.0],
        "token_type": [*metadata["token_type"], 3],
    }
