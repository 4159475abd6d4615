"""The engine next to llama.cpp and onnxruntime-genai: same weights, same threads, in turns; a table and plots.

    scripts/bench engine                 three rounds, about 15 minutes on two idle cores once its venv exists
    scripts/bench engine --quick         one round of fewer tokens
    scripts/bench engine --soak 1000     instead: mixed requests through the worker process, and its memory over them

Its venv (.work/bench-venv) is made at the first run and compiles llama.cpp, which takes ten minutes. In a round every
engine has two processes of its own, one for speed and one for memory, one after the other, so that all see the same
machine; a figure is the median over the rounds, and a ratio the median of the rounds' ratios. Nothing else should run
meanwhile. Results go to .work/bench/engine/: result.json (every figure of every round), table.md, *.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from engine_bench.models import Models, make_models
from engine_bench.report import Rounds, draw_engines, table
from engine_bench.workload import make_workload

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".work" / "bench" / "engine"
PROCESS_TIMEOUT_S = 1200


def main() -> None:
    """Measure, or soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of fewer tokens")
    parser.add_argument("--rounds", type=int, help="rounds (default: 3, or 1 with --quick)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine (default: 2)")
    parser.add_argument("--prompt-weights", action="store_true", help="ours with engine.prompt_weights")
    parser.add_argument("--out", type=Path, default=WORK, help="where the results go (default: .work/bench/engine)")
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="serve this many mixed requests instead")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    say("models")
    models = make_models(WORK / "models", arguments.threads, prompt_weights=arguments.prompt_weights)
    if arguments.soak:
        from engine_bench.soak import soak

        soak(models, arguments.soak, arguments.threads, arguments.out)
        return
    workload = make_workload(models.package / "tokenizer.json", quick=arguments.quick)
    workload_path = arguments.out / "workload.json"
    workload.write(workload_path)
    count = arguments.rounds or (1 if arguments.quick else 3)
    rounds: Rounds = []
    for number in range(count):
        say(f"round {number + 1} of {count}")
        rounds.append(run_round(models, workload_path, arguments.threads))
    conditions = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "rounds": count,
        "quick": arguments.quick,
        "prompt_weights": arguments.prompt_weights,
        "load_average_before_and_after": [*START_LOAD, *os.getloadavg()],
        **versions(),
    }
    result = {"conditions": conditions, "rounds": rounds}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    text = table(rounds, conditions)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    draw_engines(rounds, arguments.out)
    print(text)
    say(f"results in {arguments.out}")


def run_round(models: Models, workload: Path, threads: int) -> dict[str, dict[str, float]]:
    """Return the figures of each engine: all their processes, one after the other."""
    engines = [("ours", "ours", models.package), ("ours int8", "ours:int8", models.package)]
    engines += [("genai", "genai", models.genai)]
    engines += [(f"llama.cpp {name}", "llamacpp", path) for name, path in models.gguf.items()]
    figures: dict[str, dict[str, float]] = {name: {} for name, _, _ in engines}
    for kind in ("memory", "speed"):
        for name, module, path in engines:
            begun = time.monotonic()
            figures[name] |= measure(module, path, workload, threads, kind)
            say(f"{name}, {kind}: {time.monotonic() - begun:.0f} s")
    return figures


def measure(module: str, model: Path, workload: Path, threads: int, kind: str) -> dict[str, float]:
    """Run one measuring process; return its figures."""
    command = [sys.executable, "-m", "engine_bench.measure", module, str(model), str(workload), str(threads), kind]
    done = subprocess.run(
        command,
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} {kind} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "llama-cpp-python", "onnxruntime-genai", "numpy")}


def commit() -> str:
    """Return the commit of the checkout, with a mark if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """Return the processor's name and the number of cores in use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


START_LOAD = os.getloadavg()

if __name__ == "__main__":
    main()
