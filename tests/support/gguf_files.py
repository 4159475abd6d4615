"""GGUF files as llama.cpp's converter writes them, made from tiny checkpoints with the ``gguf`` package's own names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import gguf
import numpy as np

from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.components.rope import Llama3Rope, Rope, read_rope
from lamplighter_builder.fields import Fields
from support.tiny_model import tiny_tokenizer

KINDS = gguf.GGMLQuantizationType
ARCHITECTURES: Final[Mapping[str, str]] = MappingProxyType({"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2"})
"""GGUF's name of a ``model_type``, where it is another one."""


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does for its rotary kernel."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(
    path: Path,
    checkpoint: HuggingFaceCheckpoint,
    *,
    architecture: str | None = None,
    pre: str = "gpt-2",
    kind: gguf.GGMLQuantizationType = KINDS.F32,
    fused: bool = False,
) -> Path:
    """Write a tiny checkpoint; matrices in ``kind`` where their rows are whole blocks, everything else in float32.

    ``fused`` stacks query, key and value of Phi-2, as early files have them.
    """
    config = checkpoint.config
    model_type = config.text("model_type")
    name = ARCHITECTURES.get(model_type, model_type)
    writer = gguf.GGUFWriter(path, architecture or name)
    _add_config(writer, config)
    _add_tokenizer(writer, pre)
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(number, config.integer("num_hidden_layers"))
    tensors = _stack_projections(_tensors(checkpoint)) if fused else _tensors(checkpoint)
    for tensor, values in tensors:
        stored = names.get_name(tensor, try_suffixes=(".weight", ".bias")) or tensor
        if values.ndim >= 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_config(writer: gguf.GGUFWriter, config: Fields) -> None:
    model_type, heads = config.text("model_type"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", default=config.integer("hidden_size") // heads)
    writer.add_string("general.license", "mit")
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.integer("num_key_value_heads"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if model_type == "phi":
        writer.add_layer_norm_eps(config.number("layer_norm_eps"))
    else:
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))
    if model_type in ("phi3", "phimoe", "gemma2", "gemma3_text") and config.has("sliding_window"):
        writer.add_sliding_window(config.integer("sliding_window"))
    if model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.number("attn_logit_softcapping"))
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping"))
    if model_type == "gemma3_text":
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 3)
    if model_type == "phimoe":
        writer.add_expert_count(config.integer("num_local_experts"))
        writer.add_expert_used_count(config.integer("num_experts_per_tok"))
    _add_rope(writer, config, head_dim)


def _add_rope(writer: gguf.GGUFWriter, config: Fields, head_dim: int) -> None:
    rope = config.section("rope_parameters")
    assert rope is not None
    rope = rope.section("full_attention") or rope
    writer.add_rope_freq_base(rope.number("rope_theta"))
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", default=1.0))
    writer.add_rope_dimension_count(rotary_dim)
    kind = rope.text("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor"))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.number("factor"))
        writer.add_rope_scaling_orig_ctx_len(rope.integer("original_max_position_embeddings"))
    elif kind == "llama3":
        scaled = read_rope(config, rotary_dim)
        assert isinstance(scaled, Llama3Rope)
        factors = Rope(scaled.theta, rotary_dim).frequencies() / scaled.frequencies()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    elif kind == "longrope":
        original = rope.integer("original_max_position_embeddings")
        scale = config.integer("max_position_embeddings") / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for side in ("long", "short"):
            values = np.array(rope.numbers(f"{side}_factor"), dtype=np.float32)
            writer.add_tensor(f"rope_factors_{side}.weight", values)


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if text.startswith("<|") else 1 for text, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tiny_tokenizer().to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(checkpoint: HuggingFaceCheckpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and values as the converter changes them: rows interleaved, one added to norms, experts stacked."""
    config = checkpoint.config
    model_type = config.text("model_type")
    heads, key_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    experts = config.integer("num_local_experts", default=0)
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        if ARCHITECTURES.get(model_type, model_type) == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = interleave(values, heads if ".q_proj." in name else key_heads)
        if model_type.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if ".experts." not in name:
            yield name, values
        elif ".experts.0." in name:
            parts = [checkpoint.read(name.replace(".experts.0.", f".experts.{index}.")) for index in range(experts)]
            yield name.replace(".experts.0.", ".experts."), np.stack(parts)


def _stack_projections(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    found = dict(tensors)
    for name, values in found.items():
        if ".q_proj." in name:
            parts = [found[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            layer, kind = name.split(".")[2], name.rpartition(".")[2]
            yield f"blk.{layer}.attn_qkv.{kind}", np.concatenate(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield name, values
