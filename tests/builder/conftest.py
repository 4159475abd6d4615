from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.tiny_model import TinyShape, build_tiny_package, write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its own head, biases everywhere and llama3 rope scaling."""
    shape = TinyShape(
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        seed=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    return write_tiny_checkpoint(tmp_path_factory.mktemp("untied") / "untied-llama", shape)


@pytest.fixture(scope="session")
def tiny_int4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT4 package of the tied tiny Llama."""
    return build_tiny_package(tiny_checkpoint, tmp_path_factory.mktemp("int4") / "package")


@pytest.fixture(scope="session")
def smollm2_model(smollm2_gguf: Path) -> PreTrainedModel:
    """The real weights as transformers reads them, float32."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model
