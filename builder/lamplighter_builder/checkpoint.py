"""Checkpoints: what a build reads. Weights are read one tensor at a time and never mapped into memory.

``HuggingFaceCheckpoint`` is a directory with ``config.json`` and safetensors files, single or sharded. Pickled weights
are refused: to read them is to run code from the checkpoint.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import QuantizedMatrix

_DTYPES: Final[Mapping[str, npt.DTypeLike]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_MAX_HEADER_BYTES: Final = 100 * 1024 * 1024
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint, not read yet.

    Attributes:
        shape: Dimensions in Hugging Face's order.
        dtype: The file format's name of the stored type.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What belongs to the tokenizer.

    Attributes:
        tokenizer_json: Contents of ``tokenizer.json`` as the ``tokenizers`` library reads it.
        chat_template: Jinja source, or None.
        special_tokens: Texts by name (``bos_token``, ``eos_token``, …) as templates use them.
    """

    tokenizer_json: bytes
    chat_template: str | None
    special_tokens: Mapping[str, str]


class Checkpoint(ABC):
    """Weights, configuration and tokenizer of a model."""

    path: Path
    config: Fields
    generation_config: Fields

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Every file that the package is made from, for the provenance."""

    @property
    @abstractmethod
    def licence(self) -> str | None:
        """The licence that the checkpoint states, as it is written there, or None."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their Hugging Face names."""

    @abstractmethod
    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32.

        Raises:
            CheckpointError: If the file is shorter than it says or of an unknown type.
        """

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Read one matrix as codes and scales where the file stores it in a form that ``MatMulNBits`` has too.

        It dequantizes to exactly what :meth:`read` returns. None for every other tensor.

        Raises:
            CheckpointError: If the file is shorter than it says.
        """
        return None

    @abstractmethod
    def tokenizer(self) -> TokenizerFiles:
        """Read the tokenizer.

        Raises:
            CheckpointError: If there is none, or it is of an unknown kind.
        """


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    length: int
    info: TensorInfo


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.

    Raises:
        CheckpointError: If a file is missing or damaged, or the weights are pickled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        generation = path / "generation_config.json"
        self.generation_config = Fields(read_json(generation) if generation.is_file() else {}, str(generation))
        self._weight_files = find_safetensors(path)
        self._places: dict[str, _Place] = {}
        for file in self._weight_files:
            for name, place in read_safetensors_header(file).items():
                if name in self._places:
                    raise CheckpointError(f"{file}: tensor {name} is also in {self._places[name].path.name}")
                self._places[name] = place

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights, configuration and tokenizer files."""
        names = ("config.json", "generation_config.json", *_TOKENIZER_NAMES)
        return (*self._weight_files, *(self.path / name for name in names if (self.path / name).is_file()))

    @property
    def licence(self) -> str | None:
        """The ``license`` field of the model card's front matter."""
        card = self.path / "README.md"
        if not card.is_file():
            return None
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or lines[0].strip() != "---":
            return None
        for line in lines[1:]:
            if line.strip() == "---":
                return None
            key, colon, value = line.partition(":")
            if colon and key == "license":
                return value.strip().strip("'\"") or None
        return None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32.

        Raises:
            CheckpointError: If the file ends early or the stored type is no float.
        """
        place = self._places[name]
        dtype = _DTYPES.get(place.info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{place.path}: tensor {name} is stored as {place.info.dtype}",
                hint=f"supported are: {', '.join(_DTYPES)}",
            )
        count = place.length // np.dtype(dtype).itemsize
        try:
            values = np.fromfile(place.path, dtype=dtype, count=count, offset=place.offset)
        except OSError as error:
            raise CheckpointError(f"{place.path}: cannot read tensor {name}: {error.strerror}") from error
        if values.size != count:
            raise CheckpointError(f"{place.path}: the file ends inside tensor {name}", hint="download it again")
        return values.astype(np.float32, copy=False).reshape(place.info.shape)

    def tokenizer(self) -> TokenizerFiles:
        """Read ``tokenizer.json`` and the chat template.

        Raises:
            CheckpointError: If there is no ``tokenizer.json``.
        """
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{self.path}: there is no tokenizer.json",
                hint="save the tokenizer with transformers' AutoTokenizer.save_pretrained, which writes one",
            )
        settings_path = self.path / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.is_file() else {}
        return TokenizerFiles(path.read_bytes(), self._chat_template(settings), _special_tokens(settings))

    def _chat_template(self, settings: Mapping[str, object]) -> str | None:
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


_TOKENIZER_NAMES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="give a Hugging Face model directory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def find_safetensors(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model directory: those of the index if there is one, otherwise the only one.

    Raises:
        CheckpointError: If there are none, the weights are pickled, or a file of the index is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if "/" in name or not (path / name).is_file():
                raise CheckpointError(f"{index}: lists {name!r}, but there is no such file in {path}")
        return tuple(path / name for name in names)
    single = path / "model.safetensors"
    if single.is_file():
        return (single,)
    pickled = [file.name for pattern in _PICKLED for file in sorted(path.glob(pattern))]
    if pickled:
        raise CheckpointError(
            f"{path}: the weights are pickled ({pickled[0]}); loading them would run code from the checkpoint",
            hint="convert them to safetensors where you trust them, or take another revision of the model",
        )
    raise CheckpointError(f"{path}: there is neither model.safetensors nor model.safetensors.index.json")


def read_safetensors_header(path: Path) -> dict[str, _Place]:
    """Read names, shapes and places of a safetensors file and check that the file holds them all.

    Raises:
        CheckpointError: If the header is damaged or the file is shorter than the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: {size} bytes, but its header alone should have {length}", hint="download it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = msgspec.json.decode(raw, type=dict[str, dict[str, object]])
        header.pop("__metadata__", None)
        entries = {name: msgspec.convert(entry, _Entry) for name, entry in header.items()}
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    return {name: _place(path, name, entry, 8 + length, size) for name, entry in entries.items()}


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _place(path: Path, name: str, entry: _Entry, start: int, size: int) -> _Place:
    begin, end = entry.data_offsets
    if not 0 <= begin <= end or any(extent < 0 for extent in entry.shape):
        raise CheckpointError(f"{path}: tensor {name} has impossible offsets or extents")
    if start + end > size:
        raise CheckpointError(
            f"{path}: {size} bytes, but tensor {name} should end at {start + end}", hint="download it again"
        )
    dtype = _DTYPES.get(entry.dtype)
    expected = None if dtype is None else int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if expected is not None and expected != end - begin:
        raise CheckpointError(f"{path}: tensor {name} of shape {entry.shape} has {end - begin} bytes, not {expected}")
    return _Place(path, start + begin, end - begin, TensorInfo(entry.shape, entry.dtype))


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the special tokens' texts; each is a string or an object with ``content``."""
    found = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
