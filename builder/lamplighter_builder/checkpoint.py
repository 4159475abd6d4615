"""Checkpoints: what a build reads. Weights are read one tensor at a time and never mapped into memory.

``HuggingFaceCheckpoint`` is a directory with ``config.json`` and safetensors files, single or sharded. Pickled weights
are refused: to read them is to run code from the checkpoint.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from tokenizers import Tokenizer

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.package_writer import is_notice
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.safetensors_file import (
    StoredTensor,
    TensorInfo,
    read_safetensors_header,
    read_tensor,
    same_bytes,
)

_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What belongs to the tokenizer.

    Attributes:
        tokenizer_json: Contents of ``tokenizer.json`` as the ``tokenizers`` library reads it.
        chat_template: Jinja source, or None.
        special_tokens: Texts by name (``bos_token``, ``eos_token``, …) as templates use them.
        origin: File that they came from, for messages.
    """

    tokenizer_json: bytes
    chat_template: str | None
    special_tokens: Mapping[str, str]
    origin: str

    def load(self) -> Tokenizer:
        """Load ``tokenizer_json``.

        Raises:
            CheckpointError: If it cannot be read.
        """
        try:
            return Tokenizer.from_buffer(self.tokenizer_json)
        except Exception as error:  # the tokenizers library raises plain Exception for every parse error
            raise CheckpointError(f"{self.origin}: cannot be read as a tokenizer: {error}") from error

    def within(self, vocab_size: int) -> TokenizerFiles:
        """Return the files without added tokens that the embedding has no row for.

        Gemma 3 1B has one for pictures, which only its larger siblings see. Such a token cannot be computed with.
        """
        try:
            contents = json.loads(self.tokenizer_json)
            kept = [token for token in contents["added_tokens"] if token["id"] < vocab_size]
            if len(kept) == len(contents["added_tokens"]):
                return self
        except (ValueError, LookupError, TypeError):
            return self  # load() says what is wrong with it
        contents["added_tokens"] = kept
        return replace(self, tokenizer_json=json.dumps(contents, ensure_ascii=False).encode())


class WeightSource(Protocol):
    """Where a build reads weights from: a checkpoint, or one that was quantized before."""

    path: Path

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32."""

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Return one matrix as codes and scales, or None where there are none."""


class Checkpoint(ABC):
    """Weights, configuration and tokenizer of a model.

    Attributes:
        path: Where it lies, for messages.
        name: What a package of it is named after.
        source: Where it came from, for the provenance.
        config: Fields of ``config.json``.
        generation_config: Fields of ``generation_config.json``.
    """

    path: Path
    name: str
    source: str
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
    def notices(self) -> tuple[Path, ...]:
        """Licence texts and notices that must go with the weights."""
        return ()

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


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.

    Args:
        path: The directory.
        name: What it is called; None for the directory's name.
        source: Where it came from; None for its name.

    Raises:
        CheckpointError: If a file is missing or damaged, or the weights are pickled.
    """

    def __init__(self, path: Path, *, name: str | None = None, source: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        self.source = source or self.name
        self.config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        generation = path / "generation_config.json"
        self.generation_config = Fields(read_json(generation) if generation.is_file() else {}, str(generation))
        self._weight_files = find_safetensors(path)
        self._places: dict[str, StoredTensor] = {}
        for file in self._weight_files:
            for name, place in read_safetensors_header(file).items():
                if name in self._places:
                    raise CheckpointError(f"{file}: tensor {name} is also in {self._places[name].path.name}")
                self._places[name] = place
        self._places = _with_model_prefix(self._places)
        if _has_another_head(self._places, self.config):
            self.config = Fields({**self.config.values, "tie_word_embeddings": False}, self.config.origin)

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights, configuration and tokenizer files."""
        names = ("config.json", "generation_config.json", *TOKENIZER_NAMES)
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
    def notices(self) -> tuple[Path, ...]:
        """Files of the directory whose names say that they are licences or notices."""
        return tuple(path for path in sorted(self.path.iterdir()) if is_notice(path.name) and path.is_file())

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return {name: place.info for name, place in self._places.items()}

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32.

        Raises:
            CheckpointError: If the file ends early or the stored type is no float.
        """
        return read_tensor(name, self._places[name])

    def tokenizer(self) -> TokenizerFiles:
        """Read ``tokenizer.json`` and the chat template.

        Raises:
            CheckpointError: If there is no ``tokenizer.json``.
        """
        return read_tokenizer(self.path)


def _with_model_prefix(places: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Give the tensors of a decoder that was saved without its head the names that they have beside one."""
    if "embed_tokens.weight" not in places or any(name.startswith("model.") for name in places):
        return places
    return {name if name.startswith("lm_head.") else f"model.{name}": place for name, place in places.items()}


def _has_another_head(places: Mapping[str, StoredTensor], config: Fields) -> bool:
    """Tell whether a head is stored that is not the embedding, whatever the config says of ties.

    transformers ties such weights only if they are equal.
    """
    head, embedding = places.get("lm_head.weight"), places.get("model.embed_tokens.weight")
    if head is None or embedding is None or config.values.get("tie_word_embeddings") is False:
        return False
    return head.info != embedding.info or not same_bytes(head, embedding)


TOKENIZER_NAMES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Read ``tokenizer.json``, the chat template and the special tokens of a directory.

    Raises:
        CheckpointError: If there is no ``tokenizer.json``, or a file cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: there is no tokenizer.json",
            hint="save the tokenizer with transformers' AutoTokenizer.save_pretrained, which writes one",
        )
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    map_path = directory / "special_tokens_map.json"
    if map_path.is_file():
        # Early checkpoints name their special tokens here alone.
        settings = {**read_json(map_path), **{key: value for key, value in settings.items() if value is not None}}
    template = _chat_template(directory, settings)
    return TokenizerFiles(path.read_bytes(), template, _special_tokens(settings), str(path))


def _chat_template(directory: Path, settings: Mapping[str, object]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_json(path: Path, *, hint: str = "give a Hugging Face model directory") -> dict[str, object]:
    """Read a JSON object; ``hint`` says what to do where there is no such file.

    Raises:
        CheckpointError: If the file is missing or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint=hint) from error
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
    refuse_pickled(path)
    raise CheckpointError(f"{path}: there is neither model.safetensors nor model.safetensors.index.json")


def refuse_pickled(path: Path) -> None:
    """Refuse a directory without safetensors that has pickled weights.

    Raises:
        CheckpointError: If it has.
    """
    pickled = [file.name for pattern in _PICKLED for file in sorted(path.glob(pattern))]
    if pickled:
        raise CheckpointError(
            f"{path}: the weights are pickled ({pickled[0]}); loading them would run code from the checkpoint",
            hint="convert them to safetensors where you trust them, or take another revision of the model",
        )


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the special tokens' texts; each is a string or an object with ``content``."""
    found = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
