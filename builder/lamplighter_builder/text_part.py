"""The language model inside a checkpoint that also sees pictures: its tensors and configuration, without the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from lamplighter_agent.errors import CheckpointError
from lamplighter_builder.checkpoint import Checkpoint, TokenizerFiles
from lamplighter_builder.fields import Fields
from lamplighter_builder.graph import FloatArray
from lamplighter_builder.quantization.blockwise import QuantizedMatrix
from lamplighter_builder.safetensors_file import TensorInfo

_GEMMA3_TEXT: Final[Mapping[str, object]] = MappingProxyType(
    {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
    }
)
"""What published configs of Gemma 3 leave out, with the values that transformers' ``Gemma3TextConfig`` gives it."""

TEXT_DEFAULTS: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType({"gemma3": _GEMMA3_TEXT})
"""Fields of the language model by the ``model_type`` of the whole."""

_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Fields that concern the text but stand outside ``text_config``."""

_RENAMED: Final = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""Prefixes of the language model's tensors, older and newer, and those that it has alone."""

_OTHERS: Final = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class TextPart(Checkpoint):
    """The language model of a checkpoint.

    Args:
        whole: A checkpoint whose ``model_type`` is in ``TEXT_DEFAULTS``.

    Raises:
        CheckpointError: If its configuration has no ``text_config``.
    """

    def __init__(self, whole: Checkpoint) -> None:
        self._whole = whole
        self.path, self.name, self.source = whole.path, whole.name, whole.source
        self.generation_config = whole.generation_config
        text = whole.config.section("text_config")
        if text is None:
            raise CheckpointError(f"{whole.config.origin}: the field 'text_config' is missing")
        defaults = TEXT_DEFAULTS[whole.config.text("model_type")]
        shared = {key: whole.config.values[key] for key in _TOKENS if whole.config.has(key)}
        self.config = Fields({**defaults, **shared, **text.values}, text.origin)
        self._names = {alone(name): name for name in whole.tensors if not self.leaves_out(name)}

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint."""
        return self._whole.files

    @property
    def licence(self) -> str | None:
        """The checkpoint's licence."""
        return self._whole.licence

    @property
    def notices(self) -> tuple[Path, ...]:
        """The checkpoint's notices."""
        return self._whole.notices

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The language model's tensors by the names that they have where it stands alone."""
        tensors = self._whole.tensors
        return {name: tensors[stored] for name, stored in self._names.items()}

    def read(self, name: str) -> FloatArray:
        """Read one tensor as float32.

        Raises:
            CheckpointError: If the file ends early or the stored type is no float.
        """
        return self._whole.read(self._names[name])

    def quantized(self, name: str) -> QuantizedMatrix | None:
        """Read one matrix as codes and scales, or None."""
        return self._whole.quantized(self._names[name])

    def leaves_out(self, name: str) -> bool:
        """Tell whether a tensor belongs to what is not the language model."""
        return name.startswith(_OTHERS)

    def tokenizer(self) -> TokenizerFiles:
        """Read the tokenizer.

        Raises:
            CheckpointError: If there is none.
        """
        return self._whole.tokenizer()


def alone(name: str) -> str:
    """Return the name that a tensor of the language model has where that stands alone; any other name as it is."""
    for prefix, other in _RENAMED:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name
