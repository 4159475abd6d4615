"""The interface of a decoder graph, checked before its first use: a package comes from outside.

Inputs ``input_ids`` int64 [B, S], ``attention_mask`` int64 [B, T], optionally ``position_ids`` int64 [B, S] and the
overridable initializers ``logits_start`` int64 [1] and ``rope_tokens`` int64 [1] or [B],
``past_key_values.{i}.key|value`` [B, heads, capacity, head_dim]; outputs ``logits`` [B, rows, vocab_size], optionally
``hidden_states`` [B, S, hidden_size] before the head, and
``present.{i}.key|value``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from lamplighter_agent.engine.protobuf import read_fields
from lamplighter_agent.engine.protobuf_nodes import MODEL_OPSET_IMPORT, OPSET_DOMAIN
from lamplighter_agent.errors import IncompatiblePackageError, PackageError
from lamplighter_agent.package.manifest import CacheDtype, ModelFacts

_INT64: Final = "tensor(int64)"
_FLOAT: Final = "tensor(float)"
_CACHE_TYPES: Final[dict[CacheDtype, str]] = {
    "float32": _FLOAT,
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
}

_MODEL_FUNCTIONS: Final = 25
"""Field number of ``ModelProto.functions`` in onnx.proto."""


class TensorInfo(NamedTuple):
    """Name, onnxruntime's type text and shape (a number, a symbol or None for each axis) of a graph input or output."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class GraphIO:
    """Which optional inputs a graph has, and the width of its logits.

    Attributes:
        has_position_ids: True if positions are given by the caller.
        has_logits_start: True if the head can be limited to the last rows.
        has_rope_tokens: True if the planned lengths of the rows choose the rotary factors.
        logits_width: Last axis of ``logits``, at least the manifest's ``vocab_size``.
        hidden_size: Last axis of the optional output ``hidden_states``; None without it.
    """

    has_position_ids: bool
    has_logits_start: bool
    logits_width: int
    has_rope_tokens: bool = False
    hidden_size: int | None = None


def check_graph_io(
    *,
    inputs: list[TensorInfo],
    overridable: list[TensorInfo],
    outputs: list[TensorInfo],
    model: ModelFacts,
    cache_dtype: CacheDtype = "float32",
) -> GraphIO:
    """Compare a graph's interface with the contract and the manifest's facts.

    Raises:
        IncompatiblePackageError: Naming the first tensor that is missing, unknown, or of another type or shape.
    """
    given = {info.name: info for info in inputs}
    produced = {info.name: info for info in outputs}
    extra = {info.name: info for info in overridable}
    for name in ("input_ids", "attention_mask"):
        _check_tensor("input", given, name, _INT64, (None, None))
    if "position_ids" in given:
        _check_tensor("input", given, "position_ids", _INT64, (None, None))
    if "logits_start" in extra:
        _check_tensor("input", extra, "logits_start", _INT64, (1,))
    if "rope_tokens" in extra:
        _check_tensor("input", extra, "rope_tokens", _INT64, (None,))
    cache_type = _CACHE_TYPES[cache_dtype]
    cache_shape = (None, model.num_key_value_heads, None, model.head_dim)
    for layer in range(model.num_hidden_layers):
        for kind in ("key", "value"):
            _check_tensor("input", given, f"past_key_values.{layer}.{kind}", cache_type, cache_shape)
            _check_tensor("output", produced, f"present.{layer}.{kind}", cache_type, cache_shape)
    logits = _check_tensor("output", produced, "logits", _FLOAT, (None, None, None))
    width = logits.shape[2]
    if not isinstance(width, int) or width < model.vocab_size:
        raise IncompatiblePackageError(
            f"graph output 'logits' is {width} wide, but the manifest's vocab_size is {model.vocab_size}"
        )
    if "hidden_states" in produced:
        _check_tensor("output", produced, "hidden_states", _FLOAT, (None, None, model.hidden_size))
    caches = 2 * model.num_hidden_layers
    _check_no_more("input", given, {"input_ids", "attention_mask", "position_ids"}, "past_key_values.", caches)
    _check_no_more("input", extra, {"logits_start", "rope_tokens"}, "past_key_values.", 0)
    _check_no_more("output", produced, {"logits", "hidden_states"}, "present.", caches)
    return GraphIO(
        has_position_ids="position_ids" in given,
        has_logits_start="logits_start" in extra,
        has_rope_tokens="rope_tokens" in extra,
        hidden_size=model.hidden_size if "hidden_states" in produced else None,
        logits_width=width,
    )


def read_operator_domains(model: bytes) -> set[str]:
    """Return the operator domains that a serialized ``ModelProto`` imports; the default one is the empty string.

    Every node's domain must be imported, so this bounds what the graph can call. Reads the top level only.

    Raises:
        PackageError: If the bytes are no protobuf message, or import nothing.
        IncompatiblePackageError: If the model defines functions, which could import domains of their own.
    """
    domains: set[str] = set()
    for field in read_fields(memoryview(model)):
        if field.number == _MODEL_FUNCTIONS:
            raise IncompatiblePackageError("the model defines local functions, which packages may not have")
        if field.number == MODEL_OPSET_IMPORT and field.content is not None:
            names = [
                bytes(inner.content).decode("utf-8", "replace")
                for inner in read_fields(field.content)
                if inner.number == OPSET_DOMAIN and inner.content is not None
            ]
            domains.add(names[-1] if names else "")
    if not domains:
        raise PackageError("the model file is not an ONNX model: it imports no operators")
    return domains


def _check_tensor(
    side: str, tensors: dict[str, TensorInfo], name: str, dtype: str, shape: tuple[int | None, ...]
) -> TensorInfo:
    info = tensors.get(name)
    if info is None:
        raise IncompatiblePackageError(f"the graph has no {side} {name!r}")
    fits = len(info.shape) == len(shape) and all(
        wanted is None or not isinstance(axis, int) or axis == wanted
        for axis, wanted in zip(info.shape, shape, strict=True)
    )
    if info.dtype != dtype or not fits:
        raise IncompatiblePackageError(
            f"graph {side} {name!r} is {info.dtype} {list(info.shape)}, but must be {dtype} "
            f"{['*' if axis is None else axis for axis in shape]}"
        )
    return info


def _check_no_more(side: str, tensors: dict[str, TensorInfo], known: set[str], prefix: str, caches: int) -> None:
    unknown = [name for name in tensors if name not in known and not name.startswith(prefix)]
    if unknown:
        raise IncompatiblePackageError(f"the graph has an unknown {side} {unknown[0]!r}")
    found = sum(name.startswith(prefix) for name in tensors)
    if found != caches:
        raise IncompatiblePackageError(f"the graph has {found} {side}s {prefix}*, but the manifest means {caches}")
