"""GGUF files as llama.cpp's converter writes them, made from tiny checkpoints with the ``gguf`` package's own names."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from support.tiny_model import tiny_tokenizer

KINDS = gguf.GGMLQuantizationType


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does for its rotary kernel."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(
    path: Path,
    checkpoint: HuggingFaceCheckpoint,
    *,
    architecture: str = "llama",
    pre: str = "gpt-2",
    kind: gguf.GGMLQuantizationType = KINDS.F32,
) -> Path:
    """Write a tiny checkpoint; matrices in ``kind`` where their rows are whole blocks, everything else in float32."""
    config = checkpoint.config
    heads, key_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))
    writer.add_rope_freq_base(10000.0)
    writer.add_string("general.license", "mit")
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if text.startswith("<|") else 1 for text, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tiny_tokenizer().to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.integer("num_hidden_layers"))
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        if ".q_proj" in name or ".k_proj" in name:
            values = interleave(values, heads if ".q_proj" in name else key_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
