"""GGUF files: weights through the ``gguf`` package's dequantizers, configuration and tokenizer from the metadata.

llama.cpp stores the query and key projections of llama-architecture models with the rows of each head interleaved for
its own rotary kernel; they are put back into Hugging Face's order here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError
from lamplighter_builder.checkpoint import Checkpoint, TensorInfo, TokenizerFiles
from lamplighter_builder.fields import Fields
from lamplighter_builder.gguf_blocks import EXACT_KINDS, exact_matrix
from lamplighter_builder.gguf_tokenizer import GgufVocabulary, tokenizer_json
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import CodeArray, QuantizedMatrix

_Element = TypeVar("_Element", bound=np.generic)

_GLOBAL_TENSORS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_IGNORED_TENSORS: Final = frozenset({"rope_freqs.weight"})


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as the file holds it; ``heads`` is set where its rows are interleaved per head."""

    offset: int
    length: int
    kind: gguf.GGMLQuantizationType
    info: TensorInfo
    heads: int | None


class GgufCheckpoint(Checkpoint):
    """A single GGUF file of the llama architecture.

    Raises:
        CheckpointError: If the file is damaged or a metadata field is missing.
        UnsupportedModelError: If the architecture or a tensor is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._metadata = Fields({name: field.contents() for name, field in reader.fields.items()}, str(path))
        architecture = self._metadata.text("general.architecture")
        if architecture != "llama":
            raise UnsupportedModelError(
                f"{path}: GGUF architecture {architecture!r} is not supported", hint="supported is: llama"
            )
        self._vocabulary = GgufVocabulary.from_metadata(self._metadata)
        self._stored = self._index(reader)
        self.config = self._read_config()
        eos = [self._metadata.token_ids(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        self.generation_config = Fields(
            {
                "eos_token_id": list(dict.fromkeys(token for tokens in eos for token in tokens)),
                "bos_token_id": self._metadata.values.get("tokenizer.ggml.bos_token_id"),
                "pad_token_id": self._metadata.values.get("tokenizer.ggml.padding_token_id"),
            },
            str(path),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,)

    @property
    def licence(self) -> str | None:
        """``general.license`` of the metadata."""
        return self._metadata.text("general.license", default="") or None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their Hugging Face names."""
        return {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> FloatArray:
        """Read one tensor, dequantized to float32, rows in Hugging Face's order.

        Raises:
            CheckpointError: If the file ends early or the quantization is unknown to the ``gguf`` package.
        """
        stored = self._stored[name]
        try:
            values = _dequantize(self._raw(name), stored)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: tensor {name} is stored as {stored.kind.name}: {error}") from error
        return values if stored.heads is None else _restore_head_order(values, stored.heads)

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Read a ``Q4_0`` or ``Q8_0`` matrix as codes and scales, rows in Hugging Face's order; None for others.

        Raises:
            CheckpointError: If the file ends early.
        """
        stored = self._stored[name]
        if stored.kind not in EXACT_KINDS or len(stored.info.shape) != 2:
            return None
        matrix = exact_matrix(self._raw(name), stored.kind, (stored.info.shape[0], stored.info.shape[1]))
        if stored.heads is None:
            return matrix
        return QuantizedMatrix(
            format=matrix.format,
            codes=_restore_head_order(matrix.codes, stored.heads),
            scales=_restore_head_order(matrix.scales, stored.heads),
        )

    def _raw(self, name: str) -> CodeArray:
        stored = self._stored[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=stored.length, offset=stored.offset)
        if raw.size != stored.length:
            raise CheckpointError(f"{self.path}: the file ends inside tensor {name}", hint="download it again")
        return raw

    def tokenizer(self) -> TokenizerFiles:
        """Make ``tokenizer.json`` from the vocabulary in the metadata.

        Raises:
            UnsupportedModelError: If the vocabulary is of an unknown kind.
        """
        template = self._metadata.text("tokenizer.chat_template", default="")
        return TokenizerFiles(
            tokenizer_json(self._vocabulary), template or None, self._vocabulary.special_token_texts()
        )

    def _read_config(self) -> Fields:
        """Return the metadata as Hugging Face would write it in ``config.json``."""
        meta = self._metadata
        hidden_size = meta.integer("llama.embedding_length")
        heads = meta.integer("llama.attention.head_count")
        scaling = meta.text("llama.rope.scaling.type", default="none")
        rope: dict[str, object] = {"rope_theta": meta.number("llama.rope.freq_base", default=10000.0)}
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": meta.number("llama.rope.scaling.factor")}
        elif scaling != "none":
            raise UnsupportedModelError(f"{self.path}: rope scaling {scaling!r} is not supported")
        return Fields(
            {
                "model_type": "llama",
                "hidden_size": hidden_size,
                "intermediate_size": meta.integer("llama.feed_forward_length"),
                "num_hidden_layers": meta.integer("llama.block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": meta.integer("llama.attention.head_count_kv", default=heads),
                "head_dim": meta.integer("llama.attention.key_length", default=hidden_size // heads),
                "vocab_size": len(self._vocabulary.tokens),
                "max_position_embeddings": meta.integer("llama.context_length"),
                "rms_norm_eps": meta.number("llama.attention.layer_norm_rms_epsilon"),
                "hidden_act": "silu",
                "rope_parameters": rope,
                "tie_word_embeddings": "lm_head.weight" not in self._stored,
            },
            str(self.path),
        )

    def _index(self, reader: gguf.GGUFReader) -> dict[str, _Stored]:
        size = self.path.stat().st_size
        heads = self._metadata.integer("llama.attention.head_count")
        key_heads = self._metadata.integer("llama.attention.head_count_kv", default=heads)
        found = {}
        for tensor in reader.tensors:
            if tensor.name in _IGNORED_TENSORS:
                continue
            name = _hugging_face_name(tensor.name)
            if tensor.data_offset + tensor.n_bytes > size:
                raise CheckpointError(f"{self.path}: the file ends inside tensor {tensor.name}")
            shape = tuple(int(extent) for extent in reversed(tensor.shape))
            kind = gguf.GGMLQuantizationType(tensor.tensor_type)
            interleaved = heads if ".q_proj." in name else key_heads if ".k_proj." in name else None
            found[name] = _Stored(
                int(tensor.data_offset), int(tensor.n_bytes), kind, TensorInfo(shape, kind.name), interleaved
            )
        return found


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or cut short: {error}", hint="download it again") from error


def _hugging_face_name(name: str) -> str:
    if name in _GLOBAL_TENSORS:
        return _GLOBAL_TENSORS[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, kind = rest.rpartition(".")
    if prefix != "blk" or module not in _LAYER_MODULES:
        raise UnsupportedModelError(f"GGUF tensor {name!r} is unknown in the llama architecture")
    return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"


def _dequantize(raw: np.ndarray[Any, np.dtype[np.uint8]], stored: _Stored) -> FloatArray:
    kinds = gguf.GGMLQuantizationType
    if stored.kind in (kinds.F32, kinds.F16):
        values = raw.view(np.float32 if stored.kind == kinds.F32 else np.float16)
    else:
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored.kind]
        values = gguf.quants.dequantize(raw.reshape(-1, stored.info.shape[-1] // block * block_bytes), stored.kind)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(stored.info.shape)


def _restore_head_order(values: npt.NDArray[_Element], heads: int) -> npt.NDArray[_Element]:
    """Undo the interleaving: rows of a head lie as (pair, half) in the file and as (half, pair) in Hugging Face's."""
    pairs = values.shape[0] // heads // 2
    split = values.reshape(heads, pairs, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
