"""LoRA adapters of PEFT, merged into a checkpoint while it is read.

An adapted matrix is ``W + scale * B @ A`` with ``scale`` ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` if
``use_rslora``; for an embedding the product is transposed (https://arxiv.org/abs/2106.09685, and the layers of
``peft.tuners.lora``). What else an adapter may change is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from lamplighter_agent.errors import CheckpointError, UnsupportedModelError, WeightMismatchError
from lamplighter_builder.checkpoint import (
    TOKENIZER_NAMES,
    Checkpoint,
    TokenizerFiles,
    read_json,
    read_tokenizer,
    refuse_pickled,
)
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.safetensors_file import (
    StoredTensor,
    TensorInfo,
    read_safetensors_header,
    read_tensor,
    same_bytes,
)
from lamplighter_builder.text_part import TextPart, alone

_CONFIG_NAME: Final = "adapter_config.json"
_WEIGHTS_NAME: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_EMBEDDING: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"
_PARTS: Final[Mapping[str, tuple[str, bool]]] = MappingProxyType(
    {
        ".lora_A.weight": ("A", False),
        ".lora_B.weight": ("B", False),
        ".lora_embedding_A": ("A", True),
        ".lora_embedding_B": ("B", True),
    }
)
"""Endings of tensor names: which factor it is, and whether of an embedding."""
_REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "use_dora": "DoRA",
        "lora_bias": "biases of the factors",
        "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
        "layer_replication": "replicated layers",
        "target_parameters": "target_parameters",
        "trainable_token_indices": "trainable tokens",
        "use_qalora": "QA-LoRA",
        "alora_invocation_tokens": "activated LoRA",
        "arrow_config": "Arrow routing",
    }
)
"""Fields of ``adapter_config.json`` that must be false, empty or missing, and what they switch on."""
_PLAIN_STARTS: Final = frozenset({"true", "false", "gaussian", "eva", "orthogonal"})
"""Values of ``init_lora_weights`` that leave the model's own weights as they are."""


@dataclass(frozen=True, slots=True)
class _LowRank:
    """Both factors of a change, and their scale; ``embedding`` tells that the product is transposed."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    embedding: bool


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with a LoRA adapter merged into it. Its tokenizer is the adapter's own where it has one.

    Where head and embedding share a tensor and the adapter changes only one of them, they are parted. An adapter that
    was trained with added tokens brings embedding and head with more rows, which are then the vocabulary.

    Args:
        base: The model that the adapter was trained on.
        path: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: If a file is missing or damaged, or a shape does not fit.
        UnsupportedModelError: If the adapter is of another kind.
        WeightMismatchError: If a tensor of the adapter belongs to nothing in the model.
    """

    def __init__(self, base: Checkpoint, path: Path) -> None:
        self._base, self._adapter = base, path
        self.path = base.path
        self.name = path.resolve().name
        self.source = f"{base.source} + {self.name}"
        config_path, self._weights = path / _CONFIG_NAME, path / _WEIGHTS_NAME
        settings = Fields(read_json(config_path, hint="give the directory of a PEFT adapter"), str(config_path))
        _check_kind(settings)
        if not self._weights.is_file():
            refuse_pickled(path)
            raise CheckpointError(f"{path}: there is no {_WEIGHTS_NAME}")
        self._changes: dict[str, _LowRank] = {}
        self._replaced: dict[str, StoredTensor] = {}
        self._sources: dict[str, str] = {name: name for name in base.tensors}
        tied = _HEAD not in base.tensors or base.config.flag("tie_word_embeddings", default=False)
        if tied:
            self._sources[_HEAD] = _EMBEDDING
        self._read_tensors(settings)
        rows = self._vocabulary_rows(tied=tied)
        for target, stored in self._replaced.items():
            shape = self._base.tensors[self._sources[target]].shape
            if rows is not None and target in (_EMBEDDING, _HEAD):
                shape = (rows, *shape[1:])
            self._check_shape(target, stored, shape)
        parted = (self._changes.keys() | self._replaced.keys()) & {_EMBEDDING, _HEAD}
        if tied and self._replaces_both_alike(resized=rows is not None):
            self._replaced.pop(_HEAD, None)
            parted = set()
        if tied and not parted:
            del self._sources[_HEAD]
        changed = ({"tie_word_embeddings": False} if parted else {}) | ({} if rows is None else {"vocab_size": rows})
        self.config = Fields({**base.config.values, **changed}, base.config.origin) if changed else base.config
        self.generation_config = self._with_own_end() if self._has_tokenizer else base.generation_config

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the model and those of the adapter."""
        own = [name for name in (_CONFIG_NAME, _WEIGHTS_NAME) if (self._adapter / name).is_file()]
        if self._has_tokenizer:
            own += [name for name in TOKENIZER_NAMES if (self._adapter / name).is_file()]
        return (*self._base.files, *(self._adapter / name for name in own))

    @property
    def licence(self) -> str | None:
        """The model's licence."""
        return self._base.licence

    @property
    def notices(self) -> tuple[Path, ...]:
        """The model's notices."""
        return self._base.notices

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        own = {name: stored.info for name, stored in self._replaced.items()}
        return {name: own.get(name) or self._base.tensors[source] for name, source in self._sources.items()}

    @property
    def _has_tokenizer(self) -> bool:
        return (self._adapter / "tokenizer.json").is_file()

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32, with what the adapter changes.

        Raises:
            CheckpointError: If a file ends early or a stored type is no float.
        """
        if name in self._replaced:
            return read_tensor(name, self._replaced[name])
        values = self._base.read(self._sources[name])
        change = self._changes.get(name)
        if change is not None:
            product = read_tensor(name, change.b) @ read_tensor(name, change.a)
            values = values + np.float32(change.scale) * (product.T if change.embedding else product)
        return values

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Return what the model's file has for a tensor that the adapter leaves as it is."""
        touched = name in self._replaced or name in self._changes
        return None if touched else self._base.quantized(self._sources[name])

    def tokenizer(self) -> TokenizerFiles:
        """Read the adapter's tokenizer, or the model's if there is none.

        Raises:
            CheckpointError: If there is none at all, or it is of an unknown kind.
        """
        return read_tokenizer(self._adapter) if self._has_tokenizer else self._base.tokenizer()

    def _with_own_end(self) -> Fields:
        """Return the base's generation config with the end token that the adapter's tokenizer names."""
        generation = self._base.generation_config
        files = read_tokenizer(self._adapter)
        end = files.load().token_to_id(files.special_tokens.get("eos_token", ""))
        ends = generation.token_ids("eos_token_id") or self._base.config.token_ids("eos_token_id")
        ends = ends if end is None else (*(token for token in ends if token != end), end)
        return Fields({**generation.values, "eos_token_id": list(ends)}, generation.origin)

    def _read_tensors(self, settings: Fields) -> None:
        """Sort the adapter's tensors into changes and replacements, every one of them."""
        factors: dict[str, dict[str, StoredTensor]] = {}
        embeddings: set[str] = set()
        unknown, left_out = list[str](), list[str]()
        for name, stored in read_safetensors_header(self._weights).items():
            if ".lora_magnitude_vector" in name:
                raise UnsupportedModelError(f"{self._weights}: tensor {name} belongs to DoRA, which is not supported")
            bare = name.removeprefix(_PREFIX)
            ending = next((ending for ending in _PARTS if bare.endswith(ending)), None)
            target = alone(bare if ending is None else bare.removesuffix(ending) + ".weight")
            if isinstance(self._base, TextPart) and self._base.leaves_out(target):
                left_out.append(target)
            elif target not in self._sources:
                unknown.append(name)
            elif ending is None:
                self._replaced[target] = stored
            else:
                part, embedding = _PARTS[ending]
                factors.setdefault(target, {})[part] = stored
                if embedding:
                    embeddings.add(target)
        if unknown:
            raise WeightMismatchError(
                f"{self._weights}: tensors belong to nothing in {self._base.path}: {', '.join(sorted(unknown)[:5])}",
                unused=tuple(sorted(unknown)),
            )
        for target, parts in factors.items():
            self._changes[target] = self._low_rank(target, parts, settings, embedding=target in embeddings)
        self._check_targets(settings, left_out)

    def _vocabulary_rows(self, *, tied: bool) -> int | None:
        """Return the rows of embedding and head if the adapter brings both with another number than the model's."""
        given = {name: self._replaced[name].info.shape for name in (_EMBEDDING, _HEAD) if name in self._replaced}
        rows = {shape[0] for shape in given.values() if shape}
        whole = _EMBEDDING in given and (tied or _HEAD in given) and not self._changes.keys() & {_EMBEDDING, _HEAD}
        known = self._base.tensors[self._sources[_EMBEDDING]].shape[0] if _EMBEDDING in self._sources else None
        return rows.pop() if whole and len(rows) == 1 and rows != {known} else None

    def _replaces_both_alike(self, *, resized: bool) -> bool:
        """Tell whether the adapter's own embedding is its head too; PEFT writes a shared tensor under both names."""
        embedding, head = self._replaced.get(_EMBEDDING), self._replaced.get(_HEAD)
        if embedding is None:
            return False
        return resized if head is None else same_bytes(embedding, head)

    def _low_rank(
        self, target: str, parts: Mapping[str, StoredTensor], settings: Fields, *, embedding: bool
    ) -> _LowRank:
        if parts.keys() != {"A", "B"}:
            raise WeightMismatchError(f"{self._weights}: {target} has only factor {''.join(parts)}", missing=(target,))
        module = target.removesuffix(".weight")
        rank = _by_pattern(settings, "rank_pattern", module, settings.number("r"))
        alpha = _by_pattern(settings, "alpha_pattern", module, settings.number("lora_alpha"))
        shape = self._base.tensors[self._sources[target]].shape
        outer = shape[::-1] if embedding else shape
        if len(shape) != 2 or rank < 1 or rank != int(rank):
            raise CheckpointError(f"{self._weights}: {target} of shape {list(shape)} cannot have rank {rank:g}")
        self._check_shape(f"{target}, factor A", parts["A"], (int(rank), outer[1]))
        self._check_shape(f"{target}, factor B", parts["B"], (outer[0], int(rank)))
        scale = alpha / (math.sqrt(rank) if settings.flag("use_rslora", default=False) else rank)
        return _LowRank(parts["A"], parts["B"], scale, embedding)

    def _check_shape(self, what: str, stored: StoredTensor, expected: tuple[int, ...]) -> None:
        if stored.info.shape != expected:
            raise CheckpointError(
                f"{self._weights}: {what} has shape {list(stored.info.shape)}, but must be {list(expected)}"
            )

    def _check_targets(self, settings: Fields, left_out: Sequence[str]) -> None:
        """Compare with what the config says that it changes, so that no part of the adapter was lost."""
        for key, found in (("target_modules", self._changes), ("modules_to_save", self._replaced)):
            for module in settings.texts(key) or () if isinstance(settings.values.get(key), list) else ():
                if not any(f".{name}".endswith(f".{module}.weight") for name in (*found, *left_out)):
                    raise WeightMismatchError(
                        f"{settings.origin}: {key} names {module}, but {self._weights.name} has no tensor of it",
                        missing=(module,),
                    )
        if not self._changes and not self._replaced:
            raise CheckpointError(f"{self._weights}: there is no tensor")


def _check_kind(settings: Fields) -> None:
    """Refuse what is no plain LoRA.

    Raises:
        UnsupportedModelError: With the name of what is not supported.
    """
    kind = settings.text("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{settings.origin}: peft_type {kind!r} is not supported", hint="supported is: LORA"
        )
    bias = settings.text("bias", default="none")
    if bias != "none":
        raise UnsupportedModelError(f"{settings.origin}: bias {bias!r} is not supported", hint="supported is: none")
    start = settings.values.get("init_lora_weights", True)
    if str(start).lower() not in _PLAIN_STARTS:
        raise UnsupportedModelError(
            f"{settings.origin}: init_lora_weights {start!r} changes the model's own weights, which is not supported",
            hint="convert the adapter to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    for key, what in _REFUSED.items():
        if settings.values.get(key):
            raise UnsupportedModelError(f"{settings.origin}: {key}: {what} is not supported")


def _by_pattern(settings: Fields, key: str, module: str, default: float) -> float:
    """Return the value of the first pattern that fits the end of a module's path."""
    patterns = settings.section(key)
    for pattern in patterns.values if patterns is not None else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                assert patterns is not None
                return patterns.number(pattern)
        except re.error as error:
            raise CheckpointError(f"{settings.origin}: {key} has {pattern!r}, which is no pattern: {error}") from error
    return default
