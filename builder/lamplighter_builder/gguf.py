"""GGUF files: weights through the ``gguf`` package's dequantizers, configuration and tokenizer from the metadata.

Names, shapes and values come out as in the Hugging Face checkpoint that the file was converted from: rows that
llama.cpp stores in another order are put back, stacked projections and experts are cut apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.checkpoint import Checkpoint, TokenizerFiles
from lamplighter_builder.fields import Fields
from lamplighter_builder.gguf_architectures import EXPERT, GGUF_ARCHITECTURES, GgufArchitecture, GgufFacts
from lamplighter_builder.gguf_blocks import EXACT_KINDS, exact_matrix
from lamplighter_builder.gguf_file import GgufFile, GgufTensor, read_gguf, shortest_decimal
from lamplighter_builder.gguf_rope import FACTOR_TENSORS
from lamplighter_builder.gguf_tokenizer import tokenizer_json
from lamplighter_builder.gguf_vocabulary import GgufVocabulary
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import CodeArray, QuantizedMatrix
from lamplighter_builder.safetensors_file import TensorInfo

_Element = TypeVar("_Element", bound=np.generic)

_LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)
_IGNORED_TENSORS: Final = re.compile(r"(blk\.\d+\.)?attn_rot_embd\.weight", re.ASCII)
"""Frequencies that llama.cpp wrote before 2023-06 and never read."""

_SAMPLING: Final = MappingProxyType(
    {
        "temp": "temperature",
        "penalty_repeat": "repetition_penalty",
        **{key: key for key in ("top_k", "top_p", "min_p", "xtc_probability", "mirostat")},
    }
)
"""Keys under ``general.sampling`` in the words of a ``generation_config.json``."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor under its Hugging Face name: rows of a tensor of the file.

    Attributes:
        tensor: Place and kind; shape and place are those of the rows alone.
        heads: Heads whose rows are interleaved, or None.
        offset: What was added to the values.
    """

    tensor: GgufTensor
    heads: int | None = None
    offset: float = 0.0


class GgufCheckpoint(Checkpoint):
    """A GGUF file, or the first of a split one.

    Args:
        path: The file.
        name: What it is called; None for the file's name.
        source: Where it came from; None for the file's name.

    Raises:
        CheckpointError: If a file is damaged or missing, or a metadata field is missing.
        UnsupportedModelError: If the architecture or a tensor is unknown.
    """

    def __init__(self, path: Path, *, name: str | None = None, source: str | None = None) -> None:
        self.path = path
        self.name = name or _shard_stem(path.stem)
        self.source = source or path.name
        self._files = _open_all(path)
        self._metadata = self._files[0].metadata
        name = self._metadata.text("general.architecture")
        architecture = GGUF_ARCHITECTURES.get(name)
        if architecture is None:
            raise UnsupportedModelError(
                f"{path}: GGUF architecture {name!r} is not supported",
                hint=f"supported are: {', '.join(sorted(GGUF_ARCHITECTURES))}",
            )
        tensors = _merge(self._files)
        factors = {
            key: tuple(shortest_decimal(factor) for factor in self._floats(tensors.pop(key)).reshape(-1).tolist())
            for key in FACTOR_TENSORS & tensors.keys()
        }
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        self.config = Fields(architecture.config(GgufFacts(name, self._metadata, shapes, factors)), str(path))
        self._stored = dict(_hugging_face(tensors, architecture, self.config))
        self._vocabulary = GgufVocabulary.from_metadata(self._metadata)
        self.generation_config = Fields(
            {
                "eos_token_id": list(self._vocabulary.end_ids),
                "bos_token_id": self._vocabulary.special_ids.get("bos_token"),
                "pad_token_id": self._vocabulary.special_ids.get("pad_token"),
                **_sampling(self._metadata),
            },
            str(path),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all files of a split one."""
        return tuple(file.path for file in self._files)

    @property
    def licence(self) -> str | None:
        """``general.license`` of the metadata."""
        return self._metadata.text("general.license", default="") or None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their Hugging Face names."""
        return {name: TensorInfo(stored.tensor.shape, stored.tensor.kind.name) for name, stored in self._stored.items()}

    def read(self, name: str) -> FloatArray:
        """Read one tensor, dequantized to float32, rows in Hugging Face's order.

        Raises:
            CheckpointError: If the file ends early or the quantization is unknown to the ``gguf`` package.
        """
        stored = self._stored[name]
        values = self._floats(stored.tensor)
        if stored.offset:
            values -= np.float32(stored.offset)
        return values if stored.heads is None else _restore_head_order(values, stored.heads)

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Read a ``Q4_0`` or ``Q8_0`` matrix as codes and scales, rows in Hugging Face's order; None for others.

        Raises:
            CheckpointError: If the file ends early.
        """
        stored = self._stored[name]
        tensor = stored.tensor
        if tensor.kind not in EXACT_KINDS or len(tensor.shape) != 2:
            return None
        matrix = exact_matrix(_raw(tensor), tensor.kind, (tensor.shape[0], tensor.shape[1]))
        if stored.heads is None:
            return matrix
        return QuantizedMatrix(
            format=matrix.format,
            codes=_restore_head_order(matrix.codes, stored.heads),
            scales=_restore_head_order(matrix.scales, stored.heads),
        )

    def tokenizer(self) -> TokenizerFiles:
        """Make ``tokenizer.json`` from the vocabulary in the metadata.

        Raises:
            UnsupportedModelError: If the vocabulary is of an unknown kind.
        """
        template = self._metadata.text("tokenizer.chat_template", default="")
        contents = tokenizer_json(self._vocabulary)
        return TokenizerFiles(contents, template or None, self._vocabulary.special_token_texts(), str(self.path))

    def _floats(self, tensor: GgufTensor) -> FloatArray:
        try:
            return _dequantize(_raw(tensor), tensor)
        except NotImplementedError as error:
            raise CheckpointError(f"{tensor.path}: a tensor is stored as {tensor.kind.name}: {error}") from error


def _shard_stem(stem: str) -> str:
    """Return a file's name without its ending and without its number in a split model."""
    match = _SHARD.fullmatch(f"{stem}.gguf")
    return stem if match is None else match[1]


def _sampling(metadata: Fields) -> dict[str, object]:
    """Return the sampling defaults of ``general.sampling``, in the words of a ``generation_config.json``."""
    found = {name: metadata.values.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return found | {"do_sample": metadata.number("general.sampling.temp", default=0.0) > 0}


def _open_all(path: Path) -> list[GgufFile]:
    """Read the headers of a file and, if it is the first of a split one, of the others."""
    first = read_gguf(path)
    count = first.metadata.integer("split.count", default=1)
    if count <= 1:
        return [first]
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match[2]) != 1 or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} files of a split model", hint=f"give the file named …-00001-of-{count:05}.gguf"
        )
    names = [f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(2, count + 1)]
    return [first, *(read_gguf(path.with_name(name)) for name in names)]


def _merge(files: list[GgufFile]) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in found:
                raise CheckpointError(f"{tensor.path}: tensor {name} is also in {found[name].path.name}")
            if _IGNORED_TENSORS.fullmatch(name) is None:
                found[name] = tensor
    return found


def _hugging_face(
    tensors: Mapping[str, GgufTensor], architecture: GgufArchitecture, config: Fields
) -> Iterator[tuple[str, _Stored]]:
    """Yield every tensor under its Hugging Face name.

    Raises:
        CheckpointError: If a stacked tensor has not the rows that the config says.
        UnsupportedModelError: If a name is unknown.
    """
    heads, key_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    head_dim = config.integer("head_dim")
    stacked_rows = (heads * head_dim, key_heads * head_dim, key_heads * head_dim)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        for path, rows in _split(tensor, _module_paths(name, module, tensor, architecture), stacked_rows):
            interleaved = {"q_proj": heads, "k_proj": key_heads}.get(path.rpartition(".")[2])
            if interleaved is not None and architecture.interleaved and rows.shape[0] % (2 * interleaved):
                raise CheckpointError(f"{tensor.path}: tensor {name} has {rows.shape[0]} rows for {interleaved} heads")
            yield (
                f"{path}.{kind}",
                _Stored(
                    rows,
                    interleaved if architecture.interleaved else None,
                    architecture.norm_offset if path.endswith("norm") else 0.0,
                ),
            )


def _module_paths(name: str, module: str, tensor: GgufTensor, architecture: GgufArchitecture) -> tuple[str, ...]:
    """Return the paths of the Hugging Face modules that a tensor belongs to."""
    layer = _LAYER.fullmatch(module)
    if layer is None and module in architecture.modules:
        return (architecture.modules[module],)
    if layer is not None and layer[2] in architecture.layer_modules:
        return tuple(f"model.layers.{layer[1]}.{path}" for path in architecture.layer_modules[layer[2]])
    raise UnsupportedModelError(f"{tensor.path}: tensor {name!r} is unknown in this architecture")


def _split(
    tensor: GgufTensor, paths: tuple[str, ...], stacked_rows: tuple[int, ...]
) -> Iterator[tuple[str, GgufTensor]]:
    """Yield the parts of a tensor with their module paths: all of it, stacked projections, or one a expert."""
    first = paths[0]
    if EXPERT in first:
        for expert in range(tensor.shape[0]):
            part = _rows(tensor, expert, 1)
            yield first.replace(EXPERT, str(expert)), replace(part, shape=tensor.shape[1:])
    elif len(paths) == 1:
        yield first, tensor
    else:
        if sum(stacked_rows) != tensor.shape[0]:
            raise CheckpointError(
                f"{tensor.path}: stacked projections have {tensor.shape[0]} rows, but must have {sum(stacked_rows)}"
            )
        start = 0
        for path, rows in zip(paths, stacked_rows, strict=True):
            yield path, _rows(tensor, start, rows)
            start += rows


def _rows(tensor: GgufTensor, start: int, count: int) -> GgufTensor:
    """Return some rows of a tensor as a tensor; rows are whole blocks and lie one behind the other."""
    row_bytes = tensor.length // tensor.shape[0]
    return replace(
        tensor,
        offset=tensor.offset + start * row_bytes,
        length=count * row_bytes,
        shape=(count, *tensor.shape[1:]),
    )


def _raw(tensor: GgufTensor) -> CodeArray:
    try:
        raw = np.fromfile(tensor.path, dtype=np.uint8, count=tensor.length, offset=tensor.offset)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror}") from error
    if raw.size != tensor.length:
        raise CheckpointError(f"{tensor.path}: the file became shorter while it was read", hint="download it again")
    return raw


def _dequantize(raw: CodeArray, tensor: GgufTensor) -> FloatArray:
    kinds = gguf.GGMLQuantizationType
    if tensor.kind in (kinds.F32, kinds.F16, kinds.F64):
        values = raw.view({kinds.F32: "<f4", kinds.F16: "<f2", kinds.F64: "<f8"}[tensor.kind])
    else:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        # A damaged scale gives NaN or an infinite value, which the build refuses with the tensor's name.
        with np.errstate(invalid="ignore", over="ignore"):
            values = gguf.quants.dequantize(raw.reshape(-1, tensor.shape[-1] // block * block_bytes), tensor.kind)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)


def _restore_head_order(values: npt.NDArray[_Element], heads: int) -> npt.NDArray[_Element]:
    """Undo the interleaving: rows of a head lie as (pair, half) in the file and as (half, pair) in Hugging Face's."""
    pairs = values.shape[0] // heads // 2
    split = values.reshape(heads, pairs, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
