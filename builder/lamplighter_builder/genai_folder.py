"""A model folder of onnxruntime-genai from elsewhere: its configuration, and whether its graph is our contract.

A folder whose graph differs from ``agent/PACKAGE_FORMAT.md``, section 2, is refused with everything that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from lamplighter_agent.errors import CheckpointError, ManifestError, UnsupportedModelError
from lamplighter_agent.package.layout import GENAI_CONFIG_NAME, check_name
from lamplighter_agent.package.manifest import ExecutionProvider
from lamplighter_builder.checkpoint import read_json
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.common import MOST_LAYERS, read_size

_DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
_PROVIDERS: Final[Mapping[str, ExecutionProvider]] = {"cuda": "cuda", "dml": "dml"}
_TOKEN_INPUTS: Final = ("input_ids", "attention_mask")
_HIDDEN_OUTPUT: Final = "hidden_states"
_OPTIONAL_INPUTS: Final = frozenset({"position_ids", "logits_start", "rope_tokens"})
_PAST_INPUTS: Final = slice(3, 5)
_TABLE_INPUT: Final = 7
_INT64: Final = int(TensorProto.INT64)
_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
"""Names that a ``genai_config.json`` may give to the graph's inputs and outputs; left out, they are these too."""


@dataclass(frozen=True, slots=True)
class GenaiFolder:
    """A folder that was read and meets the contract.

    Attributes:
        path: The folder.
        config: ``genai_config.json``.
        model_section: Its section ``model``.
        decoder: Its section ``model.decoder``.
        search: Its section ``search``, perhaps empty.
        model_path: The ONNX file that it names.
        model: The graph, its external tensors not read.
        provider: Execution provider that the folder was made for.
        half: True if cache and logits are float16.
    """

    path: Path
    config: Mapping[str, object]
    model_section: Fields
    decoder: Fields
    search: Fields
    model_path: Path
    model: ModelProto
    provider: ExecutionProvider
    half: bool


class Sizes(NamedTuple):
    """What configuration and graph must agree on."""

    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab: int
    context: int
    hidden: int


def read_genai_folder(path: Path) -> GenaiFolder:
    """Read a folder and compare its graph with the contract.

    Raises:
        CheckpointError: If a file is missing or damaged.
        UnsupportedModelError: If the graph differs from the contract; the sentence names every difference.
    """
    config_path = path / GENAI_CONFIG_NAME
    config = read_json(config_path, hint="give a model folder of onnxruntime-genai")
    section = _section(Fields(config, str(config_path)), "model")
    decoder = _section(section, "decoder")
    search = Fields(config, str(config_path)).section("search") or Fields({}, str(config_path))
    model_path = _model_path(path, decoder)
    try:
        model = onnx.load(str(model_path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{model_path}: no ONNX model: {error}") from error
    provider, unknown = _provider(decoder)
    sizes = Sizes(
        read_size(decoder, "num_hidden_layers", most=MOST_LAYERS),
        read_size(decoder, "num_attention_heads"),
        read_size(decoder, "num_key_value_heads"),
        read_size(decoder, "head_size"),
        read_size(section, "vocab_size"),
        read_size(section, "context_length", least=2),
        read_size(decoder, "hidden_size"),
    )
    half = any(
        value.name.startswith("past_key_values.") and value.type.tensor_type.elem_type == TensorProto.FLOAT16
        for value in model.graph.input
    )
    differences = [*unknown, *_renamed(decoder), *graph_differences(model, sizes, half=half)]
    if half and provider == "cpu":
        differences.append("cache and logits are float16, but the agent's CPU engine takes float32")
    if differences:
        raise UnsupportedModelError(
            f"{path}: the graph is not the one that packages have: {'; '.join(differences)}",
            hint="build the package from the model's checkpoint instead: lamplighter-builder build",
        )
    return GenaiFolder(path, config, section, decoder, search, model_path, model, provider, half)


def graph_differences(model: ModelProto, sizes: Sizes, *, half: bool) -> Iterator[str]:
    """Yield in words everything in which a graph differs from the contract."""
    if foreign := sorted({entry.domain for entry in model.opset_import} - _DOMAINS):
        yield f"operators of {', '.join(foreign)}"
    if model.functions:
        yield "functions of its own"
    if inner := [tensor.name for tensor in inner_tensors(model) if tensor.data_location == TensorProto.EXTERNAL]:
        yield f"external weights inside of a branch ({inner[0]})"
    inputs = {value.name: value for value in model.graph.input}
    outputs = {value.name: value for value in model.graph.output}
    dtype = int(TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    caches = [f"{layer}.{part}" for layer in range(sizes.layers) for part in ("key", "value")]
    cache_shape = (None, sizes.key_value_heads, None, sizes.head_dim)
    for name in _TOKEN_INPUTS:
        yield from _tensor("input", inputs, name, _INT64, (None, None))
    for name in caches:
        yield from _tensor("input", inputs, f"past_key_values.{name}", dtype, cache_shape)
        yield from _tensor("output", outputs, f"present.{name}", dtype, cache_shape)
    yield from _tensor("output", outputs, "logits", dtype, (None, None, None))
    known = {*_TOKEN_INPUTS, *_OPTIONAL_INPUTS, *(f"past_key_values.{name}" for name in caches)}
    yield from (f"an unknown input {name}" for name in inputs if name not in known)
    if _HIDDEN_OUTPUT in outputs:
        yield from _tensor("output", outputs, _HIDDEN_OUTPUT, dtype, (None, None, sizes.hidden))
    known = {"logits", _HIDDEN_OUTPUT, *(f"present.{name}" for name in caches)}
    yield from (f"an unknown output {name}" for name in outputs if name not in known)
    yield from _attention_differences(model, sizes)
    if (rows := _rotary_rows(model)) is not None and rows < sizes.context:
        yield f"its rotary tables have {rows} rows, but context_length is {sizes.context}"
    if "logits" in outputs:
        width = outputs["logits"].type.tensor_type.shape.dim[-1].dim_value
        if width < sizes.vocab:
            yield f"logits are {width or 'an unknown number'} wide, but vocab_size is {sizes.vocab}"


def _attention_differences(model: ModelProto, sizes: Sizes) -> Iterator[str]:
    """Yield what keeps a cache from being one buffer for past and present."""
    served = set()
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        names = list(node.input[_PAST_INPUTS]), list(node.output[1:3])
        layer = names[0][0].split(".")[1] if names[0] and names[0][0].count(".") == 2 else ""
        wanted = (
            [f"past_key_values.{layer}.{part}" for part in ("key", "value")],
            [f"present.{layer}.{part}" for part in ("key", "value")],
        )
        if names != wanted:
            yield f"{node.name}: its cache is not a graph input and output of one layer"
            continue
        served.add(layer)
        heads = (_integer(node, "num_heads"), _integer(node, "kv_num_heads"))
        if heads != (sizes.heads, sizes.key_value_heads):
            yield (
                f"{node.name}: has {heads[0]} and {heads[1]} heads, but the configuration says {sizes.heads} and "
                f"{sizes.key_value_heads}"
            )
    if missing := sorted(set(map(str, range(sizes.layers))) - served, key=int):
        yield f"no GroupQueryAttention for the cache of layer {', '.join(missing)}"


def _rotary_rows(model: ModelProto) -> int | None:
    """Return the positions that the attention can rotate; None where its tables are made by other nodes."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    tables = {
        node.input[_TABLE_INPUT]
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention" and len(node.input) > _TABLE_INPUT
    }
    return min((shapes[name][0] for name in tables if shapes.get(name)), default=None)


def _tensor(
    side: str, tensors: Mapping[str, ValueInfoProto], name: str, dtype: int, shape: tuple[int | None, ...]
) -> Iterator[str]:
    value = tensors.get(name)
    if value is None:
        yield f"no {side} {name}"
        return
    found = value.type.tensor_type
    extents = [extent.dim_value or extent.dim_param or "?" for extent in found.shape.dim]
    fits = len(extents) == len(shape) and all(
        wanted is None or not isinstance(extent, int) or extent == wanted
        for extent, wanted in zip(extents, shape, strict=True)
    )
    if found.elem_type != dtype or not fits:
        kind = TensorProto.DataType.Name(found.elem_type).lower()
        wanted_kind = TensorProto.DataType.Name(dtype).lower()
        wanted_shape = [axis or "any" for axis in shape]
        yield f"{side} {name} is {kind} {extents}, but must be {wanted_kind} {wanted_shape}"


def _renamed(decoder: Fields) -> Iterator[str]:
    for side, names in _NAMES.items():
        section = decoder.section(side) or Fields({}, decoder.origin)
        for key, value in section.values.items():
            if key not in names:
                yield f"{side} of the kind {key}"
            elif value != names[key]:
                yield f"{key} is called {value!r}, not {names[key]!r}"


def _provider(decoder: Fields) -> tuple[ExecutionProvider, list[str]]:
    """Return the first provider of the session options, and what is not known of them."""
    options = decoder.section("session_options")
    listed = options.values.get("provider_options") if options is not None else None
    entries = listed if isinstance(listed, list) else []
    names = [str(name).lower() for entry in entries if isinstance(entry, dict) for name in entry]
    if not names or names[0] == "cpu":
        return "cpu", []
    if names[0] in _PROVIDERS:
        return _PROVIDERS[names[0]], []
    return "cpu", [f"it is made for the provider {names[0]!r}"]


def _model_path(folder: Path, decoder: Fields) -> Path:
    name = decoder.text("filename")
    try:
        check_name(name, "decoder.filename")
    except ManifestError as error:
        raise CheckpointError(f"{decoder.origin}: {error.message}", hint=error.hint) from error
    if not (folder / name).is_file():
        raise CheckpointError(f"{decoder.origin}: names {name!r}, but there is no such file in {folder}")
    return folder / name


def _section(fields: Fields, key: str) -> Fields:
    section = fields.section(key)
    if section is None:
        raise CheckpointError(f"{fields.origin}: the section {key!r} is missing")
    return section


def inner_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield the tensors that lie inside of nodes: constants, and initializers of branches."""
    pending = list(model.graph.node)
    while pending:
        for attribute in pending.pop().attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from attribute.g.initializer
                pending += attribute.g.node


def _integer(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
