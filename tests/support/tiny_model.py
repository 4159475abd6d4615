"""Tiny random Llama checkpoints, written by transformers itself, and packages built from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lamplighter_agent.package.manifest import ExecutionProvider
from lamplighter_builder.build import BuildOptions, build_package
from lamplighter_builder.checkpoint import HuggingFaceCheckpoint
from lamplighter_builder.precision import PrecisionName, QuantizationOptions, QuantizerName
from lamplighter_builder.progress import SilentProgress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEXT = (
    "The lamplighter walks along the harbour at dusk and lights one lamp after the other.",
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 漢字 🙂 1234567890",
    "user assistant system message messages answer answers question questions",
)


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Sizes of a tiny Llama."""

    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, str | float | int] | None = None
    seed: int = 0


def tiny_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer of 384 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        show_progress=False,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def write_tiny_checkpoint(directory: Path, shape: TinyShape | None = None, *, chat_template: str = CHATML) -> Path:
    """Write a random checkpoint with tokenizer, chat template and model card, and return the directory."""
    from transformers import LlamaConfig

    shape = shape or TinyShape()
    config = LlamaConfig(
        vocab_size=tiny_tokenizer().get_vocab_size(),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        attention_bias=shape.attention_bias,
        mlp_bias=shape.mlp_bias,
        rope_parameters=shape.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0},
        # Wide enough that the most likely token leads clearly.
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_checkpoint(directory, config, seed=shape.seed, chat_template=chat_template)


def save_checkpoint(directory: Path, config: PretrainedConfig, *, seed: int, chat_template: str = CHATML) -> Path:
    """Write a random model of a config with tokenizer, chat template and model card, and return the directory."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        # transformers starts biases at zero and norms at one, which would hide that they are mixed up.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    model.save_pretrained(directory)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tiny_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n", encoding="utf-8")
    return directory


def build_tiny_package(
    checkpoint: Path,
    output: Path,
    precision: PrecisionName = "int4",
    *,
    name: str = "tiny",
    version: str = "1.0.0",
    execution_provider: ExecutionProvider = "cpu",
    quantizer: QuantizerName = "rtn",
) -> Path:
    """Build a package from a Hugging Face directory and return its directory."""
    options = BuildOptions(
        output=output,
        precision=precision,
        name=name,
        version=version,
        execution_provider=execution_provider,
        quantization=QuantizationOptions(quantizer=quantizer),
        measure_fidelity=False,
    )
    build_package(HuggingFaceCheckpoint(checkpoint), options, SilentProgress())
    return output
