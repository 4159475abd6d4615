"""Memory and time of a build: a checkpoint of Phi-3.5-mini's shape with random weights, built to a package.

    scripts/bench builder                      3.8 billion parameters: 7.7 GB of checkpoint, 2.4 GB of package
    scripts/bench builder --layers 4           a smaller one of the same width
    scripts/bench builder --precision int8 --keep

The checkpoint is written in bfloat16 to sharded safetensors, a few rows at a time, into .work/bench; an existing one of
the same shape is used again. Its random weights are slices of one random block, which costs little to write and makes
no difference to a quantizer. The build runs as a process of its own. Peak resident memory is the kernel's figure
(ru_maxrss, mapped files included); since a build could start processes, the sum over the process tree is sampled too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".work" / "bench"
GIB = 1024**3
SHARD_BYTES = 5 * 10**9
BLOCK_ELEMENTS = 4 * 1024 * 1024
SAMPLE_EVERY_S = 0.2


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint, by default Phi-3.5-mini's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every tensor of a Phi-3 of these sizes, in the order of the layers."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.qkv_proj.weight", (3 * self.hidden, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_up_proj.weight", (2 * self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape, dtype=np.int64)) for _, shape in self.tensors())

    def config(self) -> dict[str, object]:
        """Return ``config.json``; LongRoPE's factors rise from 1, the long ones faster."""
        pairs = self.hidden // self.heads // 2
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + pair / pairs for pair in range(pairs)],
                "long_factor": [1.0 + 60.0 * pair / pairs for pair in range(pairs)],
            },
            "sliding_window": 262144,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


def write_checkpoint(directory: Path, shape: Shape) -> None:
    """Write the checkpoint; the directory appears only when it is whole."""
    draft = directory.with_name(directory.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, extents in shape.tensors():
        size = 2 * int(np.prod(extents, dtype=np.int64))
        if held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((name, extents))
        held += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(draft / file, shard, seed=number)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    (draft / "config.json").write_text(json.dumps(shape.config(), indent=1))
    write_tokenizer(draft / "tokenizer.json")
    draft.rename(directory)


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], *, seed: int) -> None:
    """Write one safetensors file of bfloat16 tensors, a block at a time; norms are ones."""
    header: dict[str, object] = {}
    position = 0
    for name, extents in tensors:
        size = 2 * int(np.prod(extents, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": extents, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    generator = np.random.default_rng(seed)
    block = (generator.standard_normal(2 * BLOCK_ELEMENTS, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, extents in tensors:
            left = int(np.prod(extents, dtype=np.int64))
            if len(extents) == 1:
                stream.write(np.ones(left, dtype=ml_dtypes.bfloat16).tobytes())
                continue
            while left:
                count = min(left, BLOCK_ELEMENTS)
                start = int(generator.integers(BLOCK_ELEMENTS))
                stream.write(block[start : start + count].tobytes())
                left -= count


def write_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(path))


@dataclass
class Usage:
    """What a process and its children used."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    tree_peak_bytes: int


def measure(command: list[str]) -> Usage:
    """Run a command and return what it used; its progress goes to this terminal.

    Raises:
        SystemExit: If it fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        parent = psutil.Process(process.pid)
        while not ended.wait(SAMPLE_EVERY_S):
            try:
                tree = [parent, *parent.children(recursive=True)]
                peak[0] = max(peak[0], sum(one.memory_info().rss for one in tree))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return Usage(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak[0])


def folder_bytes(directory: Path) -> int:
    """Return the bytes of a directory's files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench builder", description=__doc__.partition("\n")[0])
    parser.add_argument("-p", "--precision", default="int4")
    parser.add_argument("-e", "--execution-provider", default="cpu")
    parser.add_argument("-q", "--quantizer", help="how matrices are rounded; gptq calibrates (default: the builder's)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32064)
    parser.add_argument("--keep", action="store_true", help="keep the package; the checkpoint is always kept")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main() -> None:
    """Write the checkpoint if it is not there, build it and print what that took."""
    options = parse()
    shape = Shape(options.layers, options.hidden, options.intermediate, options.heads, options.vocab)
    name = f"phi3-{shape.layers}x{shape.hidden}x{shape.intermediate}-h{shape.heads}-v{shape.vocab}"
    checkpoint, package = WORK / name, WORK / f"{name}-{options.precision}-{options.execution_provider}"
    if not checkpoint.is_dir():
        print(f"writing {checkpoint}: {2 * shape.parameters / 1e9:.1f} GB", file=sys.stderr)
        write_checkpoint(checkpoint, shape)
    shutil.rmtree(package, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "lamplighter-builder"), "build", "-m", str(checkpoint)]
    command += ["-o", str(package), "-p", options.precision, "-e", options.execution_provider, "--licence", "MIT"]
    if options.quantizer is not None:
        command += ["-q", options.quantizer]
    usage = measure(command)
    result = {
        "parameters": shape.parameters,
        "checkpoint_bytes": folder_bytes(checkpoint),
        "package_bytes": folder_bytes(package),
        "precision": options.precision,
        "execution_provider": options.execution_provider,
        "quantizer": options.quantizer,
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        "peak_rss_bytes": usage.peak_bytes,
        "peak_tree_rss_bytes": usage.tree_peak_bytes,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }
    if not options.keep:
        shutil.rmtree(package)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{shape.parameters / 1e9:.2f} billion parameters, {result['checkpoint_bytes'] / 1e9:.2f} GB of bfloat16, to "
        f"{options.precision} for {options.execution_provider}: {result['package_bytes'] / 1e9:.2f} GB in "
        f"{usage.wall_s:.0f} s ({usage.cpu_s:.0f} s of CPU time, {result['cores']} cores), peak RSS "
        f"{usage.peak_bytes / GIB:.2f} GiB (whole process tree, sampled: {usage.tree_peak_bytes / GIB:.2f} GiB)"
    )


if __name__ == "__main__":
    main()
