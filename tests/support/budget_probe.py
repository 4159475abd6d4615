"""Loads a package, fills every slot and the prefix cache of its plan, and prints plan and use as JSON.

Run as ``python -m support.budget_probe PACKAGE PREPARED``; the limit is that of the control group it runs in.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import msgspec

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.service.memory_view import memory_report

GENERATED = 12
MOST_TOKENS = 5000


def main(package: Path, prepared: Path) -> None:
    begun = time.monotonic()
    engine = Engine.load(package, options=EngineOptions(), prepared_root=prepared)
    load_s, plan = time.monotonic() - begun, engine.plan
    params = GenerationParams(max_tokens=GENERATED, temperature=1.0, seed=1, ignore_eos=True, logprobs=5)
    words = random.Random(1)
    length = min(plan.kv_tokens // plan.slots, plan.max_context_tokens) - GENERATED
    generated = 0
    for turn in range(2):
        # The first turn leaves a full prefix cache; the second fills the slots beside it, on large plans in part.
        length = min(length, MOST_TOKENS // plan.slots) if turn else length
        for slot in range(plan.slots):
            prompt = [words.randrange(100, 40_000) for _ in range(length)]
            engine.scheduler.submit(f"{turn}-{slot}", prompt, params)
        while not engine.scheduler.idle:
            generated += sum(1 for event in engine.scheduler.step() if type(event).__name__ == "TextDelta")
    answer = {
        "report": memory_report(plan, os.getpid()),
        "load_s": load_s,
        "generated": generated,
        "prefix_bytes": engine.prefixes.nbytes,
        "prepared": engine.prepared,
        "pressure": engine.guard.level,
    }
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
