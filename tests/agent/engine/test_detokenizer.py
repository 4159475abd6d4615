from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.engine.detokenizer import StopStrings, StreamingDetokenizer
from lamplighter_agent.engine.tokenizer import PackageTokenizer
from support.toy_engine import SPECIAL, byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}
WORDS = st.text(st.sampled_from(["a", "b", " ", "é", "中", "😀", "\ufffd", "\n"]), max_size=30)


def stream(tokenizer: PackageTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def byte_tokens(data: bytes) -> list[int]:
    """Return byte-fallback ids of raw bytes, valid UTF-8 or not."""
    return [4 + byte for byte in data]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(token_ids=st.lists(st.integers(0, 256), max_size=40))
def test_pieces_of_any_tokens_join_to_the_decoded_whole(name: str, token_ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=WORDS)
def test_pieces_of_text_are_whole_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces = stream(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text, special=False))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTE_LEVEL.encode("x😀y", special=False)
    assert stream(BYTE_LEVEL, ids) == ["x", "", "", "", "😀", "y", ""]


def test_a_run_of_byte_tokens_is_judged_as_a_whole() -> None:
    run = byte_tokens("中".encode())
    assert stream(BYTE_FALLBACK, [2, *run, 2]) == ["a", "", "", "", "中a", ""]
    assert stream(BYTE_FALLBACK, [2, *run, *byte_tokens(b"\xff"), 2])[-2] == "\ufffd" * 4 + "a"


def test_half_a_character_at_the_end_comes_out_as_a_mark() -> None:
    assert stream(BYTE_LEVEL, BYTE_LEVEL.encode("é", special=False)[:1]) == ["", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    special = BYTE_LEVEL.encode(SPECIAL, special=True)
    assert stream(BYTE_LEVEL, [*special, *BYTE_LEVEL.encode("a", special=False), *special]) == ["", "a", "", ""]


def cut(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    """Return what is let through piece by piece, the tail last, and whether a stop string was met."""
    filter_ = StopStrings(stops)
    shown = []
    for piece in pieces:
        text, met = filter_.push(piece)
        shown.append(text)
        if met:
            return shown, True
    return [*shown, filter_.finish()], False


def test_text_is_held_back_while_it_may_become_a_stop_string() -> None:
    assert cut(("STOP",), ["abS", "TO", "x"]) == (["ab", "", "STOx", ""], False)


def test_a_stop_string_across_pieces_is_cut_out_with_what_follows() -> None:
    assert cut(("STOP",), ["ab S", "TO", "P and more"]) == (["ab ", "", ""], True)


def test_the_first_stop_string_in_the_text_wins() -> None:
    assert cut(("later", "now"), ["a now b later"]) == (["a "], True)


def test_a_repeated_beginning_does_not_hide_a_stop_string() -> None:
    assert cut(("aab",), ["aa", "a", "b"]) == (["", "a", ""], True)


def test_held_text_comes_out_at_the_end() -> None:
    assert cut(("\n\n",), ["a\n"]) == (["a", "\n"], False)


def test_without_stop_strings_nothing_is_held() -> None:
    assert cut((), ["a", "b"]) == (["a", "b", ""], False)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_split_of_a_text_stops_where_the_whole_does(text: str, stops: list[str], data: st.DataObject) -> None:
    points = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *points], [*points, len(text)], strict=True)]
    shown, met = cut(tuple(stops), pieces)
    # What ends first is met first: the earliest end decides, and of those the earliest beginning.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert met == bool(ends)
    if not met:
        assert "".join(shown) == text
    else:
        assert not any(stop in "".join(shown) for stop in stops)
        assert text.startswith("".join(shown))
