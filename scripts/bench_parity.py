"""How far every family's graph is from transformers, depth by depth, and whether onnxruntime-genai agrees.

Each family is a tiny random checkpoint that transformers writes. A number is the largest absolute difference of a
logit between transformers in float32 and the fp32 package, over the tokens of that depth (tests/support has them).
``engine`` tells whether our engine's greedy tokens, three requests in one batch, are those of transformers;
``genai`` whether onnxruntime-genai's are our engine's, for fp32 and INT4; ``-``: not installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from lamplighter_agent.engine.generate import Engine
from lamplighter_builder.parity import Reference
from lamplighter_builder.runner import Runner
from support.engine_tokens import OPTIONS, PROMPTS, genai_agrees, has_genai, tokens_together
from support.families import FAMILIES, load_reference, write_family_checkpoint
from support.parity_depths import DEPTHS
from support.tiny_model import build_tiny_package

Row = dict[str, float | str]


def main() -> int:
    """Measure and print; the exit code is 1 if a difference is above the bound or tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--bound", type=float, default=1e-3, help="largest difference allowed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = {family: measure(family) for family in arguments.family or FAMILIES}
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)
    passed = all(
        value in ("same", "-") or (isinstance(value, float) and value < arguments.bound)
        for row in rows.values()
        for value in row.values()
    )
    return 0 if passed else 1


def measure(family: str) -> Row:
    """Build a family's packages and compare them."""
    print(f"{family} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        checkpoint = write_family_checkpoint(root / "checkpoint", family)
        package = build_tiny_package(checkpoint, root / "fp32", "fp32")
        reference, runner = load_reference(checkpoint), Runner(package / "model.onnx")
        row: Row = {name: depth(reference, runner).max_difference for name, depth in DEPTHS.items()}
        row["engine"] = "same" if engine_agrees(package, reference) else "DIFFERENT"
        for precision in ("fp32", "int4"):
            name = f"genai {precision}"
            if not has_genai():
                row[name] = "-"
                continue
            if precision == "int4":
                package = build_tiny_package(checkpoint, root / "int4", "int4")
            row[name] = "same" if genai_agrees(package) else "DIFFERENT"
    return row


def engine_agrees(package: Path, reference: Reference) -> bool:
    """Tell whether our engine's tokens are the most likely ones of transformers at every step."""
    engine = Engine.load(package, options=OPTIONS)
    for prompt, generated in zip(PROMPTS, tokens_together(engine, PROMPTS), strict=True):
        logits = reference.logits(np.array([prompt + generated[:-1]], dtype=np.int64))
        if logits[0, len(prompt) - 1 :].argmax(-1).tolist() != generated:
            return False
    return True


def print_table(rows: dict[str, Row]) -> None:
    """Print one line a family, and the conditions."""
    columns = list(next(iter(rows.values())))
    first = max(map(len, rows))
    print(" " * first, *(f"{column:>13}" for column in columns))
    for family, row in rows.items():
        cells = (f"{value:13.1e}" if isinstance(value, float) else f"{value:>13}" for value in row.values())
        print(f"{family:{first}}", *cells)
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "transformers", "torch"))
    print(f"\n{platform.machine()}; {versions}; largest difference of a logit to transformers in float32")


if __name__ == "__main__":
    sys.exit(main())
