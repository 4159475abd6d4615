from __future__ import annotations

import msgspec
import pytest

from lamplighter_agent.engine.graph_io import GraphIO, TensorInfo, check_graph_io, read_operator_domains
from lamplighter_agent.errors import IncompatiblePackageError, PackageError
from lamplighter_agent.package.manifest import ModelFacts, decode_manifest
from support.manifests import manifest_tree

MODEL: ModelFacts = decode_manifest(msgspec.json.encode(manifest_tree())).model
INT, FLOAT = "tensor(int64)", "tensor(float)"
CACHES = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]

Infos = dict[str, TensorInfo]


def infos(*entries: tuple[str, str, tuple[int | str | None, ...]]) -> Infos:
    return {entry[0]: TensorInfo(*entry) for entry in entries}


def inputs() -> Infos:
    return infos(
        ("input_ids", INT, ("batch", "tokens")),
        ("attention_mask", INT, ("batch", "total")),
        *((f"past_key_values.{name}", FLOAT, ("batch", 2, "past", 16)) for name in CACHES),
    )


def outputs() -> Infos:
    return infos(
        ("logits", FLOAT, ("batch", "rows", 256)),
        *((f"present.{name}", FLOAT, ("batch", 2, "total", 16)) for name in CACHES),
    )


def check(given: Infos, produced: Infos, extra: Infos | None = None) -> GraphIO:
    return check_graph_io(
        inputs=list(given.values()),
        overridable=list((extra or {}).values()),
        outputs=list(produced.values()),
        model=MODEL,
    )


def test_the_plain_interface() -> None:
    assert check(inputs(), outputs()) == GraphIO(has_position_ids=False, has_logits_start=False, logits_width=256)


def test_the_optional_inputs() -> None:
    given = inputs() | infos(("position_ids", INT, ("batch", "tokens")))
    found = check(given, outputs(), infos(("logits_start", INT, (1,)), ("rope_tokens", INT, ("rows",))))
    assert found == GraphIO(has_position_ids=True, has_logits_start=True, logits_width=256, has_rope_tokens=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (infos(("input_ids", "tensor(int32)", ("b", "s"))), "input 'input_ids' is tensor\\(int32\\)"),
        (infos(("attention_mask", INT, ("b",))), "input 'attention_mask'"),
        (infos(("past_key_values.1.value", FLOAT, ("b", 3, "p", 16))), "past_key_values.1.value"),
        (infos(("past_key_values.0.key", "tensor(float16)", ("b", 2, "p", 16))), "past_key_values.0.key"),
        (infos(("past_key_values.2.key", FLOAT, ("b", 2, "p", 16))), "5 inputs past_key_values"),
        (infos(("inputs_embeds", FLOAT, ("b", "s", 64))), "unknown input 'inputs_embeds'"),
    ],
)
def test_a_wrong_input_is_refused_by_name(change: Infos, message: str) -> None:
    with pytest.raises(IncompatiblePackageError, match=message):
        check(inputs() | change, outputs())


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "past_key_values.1.key"])
def test_a_missing_input_is_refused_by_name(name: str) -> None:
    given = inputs()
    del given[name]
    with pytest.raises(IncompatiblePackageError, match=f"no input '{name}'"):
        check(given, outputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (infos(("logits", FLOAT, ("b", "s", 255))), "'logits' is 255 wide, but the manifest's vocab_size is 256"),
        (infos(("logits", FLOAT, ("b", "s", "v"))), "'logits' is v wide"),
        (infos(("present.0.key", FLOAT, ("b", 2, "t", 32))), "output 'present.0.key'"),
        (infos(("hidden_states", FLOAT, ("b", "s", 1))), "output 'hidden_states'"),
        (infos(("attentions", FLOAT, ("b", "s", 64))), "unknown output 'attentions'"),
    ],
)
def test_a_wrong_output_is_refused_by_name(change: Infos, message: str) -> None:
    with pytest.raises(IncompatiblePackageError, match=message):
        check(inputs(), outputs() | change)


def test_an_unknown_overridable_initializer_is_refused() -> None:
    with pytest.raises(IncompatiblePackageError, match="unknown input 'weights'"):
        check(inputs(), outputs(), infos(("weights", FLOAT, (4, 4))))


def message(*fields: tuple[int, bytes]) -> bytes:
    """Return a protobuf message of length-delimited fields shorter than 128 bytes."""
    return b"".join(bytes(varint(number << 3 | 2)) + bytes([len(content)]) + content for number, content in fields)


def varint(value: int) -> list[int]:
    return [value] if value < 128 else [value & 127 | 128, *varint(value >> 7)]


OPSET_DEFAULT = (8, bytes([2 << 3, 22]))
OPSET_CONTRIB = (8, message((1, b"com.microsoft")) + bytes([2 << 3, 1]))


def test_operator_domains_are_read() -> None:
    model = bytes([1 << 3, 10]) + message((7, b"a graph"), OPSET_DEFAULT, OPSET_CONTRIB)
    assert read_operator_domains(model) == {"", "com.microsoft"}


def test_local_functions_are_refused() -> None:
    with pytest.raises(IncompatiblePackageError, match="local functions"):
        read_operator_domains(message(OPSET_DEFAULT, (25, b"f")))


@pytest.mark.parametrize(
    "data",
    [b"", b"not a model", message((7, b"graph only")), message(OPSET_DEFAULT)[:-1], b"\xff" * 12, b"\x0b", b"\x42"],
    ids=["empty", "text", "no opsets", "cut off", "endless number", "group", "no length"],
)
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(PackageError):
        read_operator_domains(data)
