"""``genai_config.json`` and ``tokenizer_config.json``: what makes a package a model folder of onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from onnx import GraphProto

from lamplighter_agent.package.layout import MODEL_NAME
from lamplighter_agent.package.manifest import ExecutionProvider, GenerationDefaults, ModelFacts
from lamplighter_builder.targets import GraphTarget

_MAX_LENGTH_TOKENS: Final = 4096
"""onnxruntime-genai allocates its cache for ``max_length`` at once, so the model's full context is no default."""

_PROVIDER_OPTIONS: Final[Mapping[ExecutionProvider, list[dict[str, dict[str, str]]]]] = {
    "cpu": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
    "dml": [{"dml": {}}],
}


def genai_config(model: ModelFacts, generation: GenerationDefaults, target: GraphTarget, graph: GraphProto) -> bytes:
    """Return the contents of ``genai_config.json`` for a written graph."""
    pad = generation.pad_token_id if generation.pad_token_id is not None else generation.eos_token_ids[0]
    takes_positions = any(value.name == "position_ids" for value in graph.input)
    decoder: dict[str, object] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": _PROVIDER_OPTIONS[target.provider]},
        "filename": MODEL_NAME,
        "head_size": model.head_dim,
        "hidden_size": model.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **({"position_ids": "position_ids"} if takes_positions else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_hidden_layers,
        "num_key_value_heads": model.num_key_value_heads,
    }
    config = {
        "model": {
            **({} if generation.bos_token_id is None else {"bos_token_id": generation.bos_token_id}),
            "context_length": model.max_position_embeddings,
            "decoder": decoder,
            "eos_token_id": list(generation.eos_token_ids),
            "pad_token_id": pad,
            "type": model.model_type,
            "vocab_size": model.vocab_size,
        },
        "search": {
            "do_sample": generation.do_sample,
            "max_length": min(model.max_position_embeddings, _MAX_LENGTH_TOKENS),
            "past_present_share_buffer": True,
            "repetition_penalty": generation.repetition_penalty,
            "temperature": generation.temperature,
            "top_k": generation.top_k or 50,
            "top_p": generation.top_p,
        },
    }
    return _encode(config)


def tokenizer_config(special_tokens: Mapping[str, str], chat_template: str | None, context_tokens: int) -> bytes:
    """Return the contents of ``tokenizer_config.json``; onnxruntime-genai chooses its tokenizer by the class in it."""
    config: dict[str, object] = {
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return _encode(config)


def _encode(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
