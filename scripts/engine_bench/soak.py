"""Many mixed requests through the worker process, and what they leave in its memory.

Ten requests are under way at a time, more than there are slots: short and long prompts, a shared beginning, texts that
repeat themselves, greedy and sampled, two answers, log-probabilities, stop strings, and clients that leave, some while
their prompt is computed. After each ten the worker is idle, and its resident memory is noted.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path

from engine_bench.models import Models
from engine_bench.report import MIB, draw_soak
from engine_bench.workload import Workload, make_workload
from lamplighter_agent.engine.events import TextDelta
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.service.worker import EngineWorker, WorkerSpec
from lamplighter_agent.service.worker_messages import Prompt

AT_ONCE = 10
FIRST_REQUESTS = 100
ALLOWED_GROWTH = 0.05


def soak(models: Models, requests: int, threads: int, out: Path) -> None:
    """Serve ``requests`` requests; write ``soak.json`` and ``soak.svg``; exit 1 if memory grew."""
    if requests <= FIRST_REQUESTS:
        raise SystemExit(f"a soak needs more than {FIRST_REQUESTS} requests")
    workload = make_workload(models.package / "tokenizer.json", quick=True)
    options = EngineOptions(
        memory_budget_bytes=512 * MIB, prefix_cache_bytes=16 * MIB, max_context_tokens=1024, threads=threads
    )
    spec = WorkerSpec(package=models.package, prepared_root=models.prepared, options=options)
    begun = time.monotonic()
    resident, ends = asyncio.run(_serve(spec, workload, requests))
    first, last = resident[FIRST_REQUESTS // AT_ONCE - 1], resident[-1]
    growth = last / first - 1
    result = {
        "requests": requests,
        "seconds": time.monotonic() - begun,
        "ends": ends,
        "resident_after_first_100_bytes": first,
        "resident_at_the_end_bytes": last,
        "growth": growth,
        "resident_bytes": resident,
    }
    (out / "soak.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw_soak([value for value in resident for _ in range(AT_ONCE)], out)
    print(
        f"{requests} requests ({', '.join(f'{count} {reason}' for reason, count in sorted(ends.items()))}): "
        f"{first / MIB:.1f} MiB resident after the first {FIRST_REQUESTS}, {last / MIB:.1f} at the end ({growth:+.1%})"
    )
    if growth > ALLOWED_GROWTH:
        sys.exit(1)


async def _serve(spec: WorkerSpec, workload: Workload, requests: int) -> tuple[list[int], dict[str, int]]:
    worker, ends = EngineWorker(spec), dict[str, int]()
    await worker.start()
    choose, resident = random.Random(11), list[int]()
    try:
        for start in range(0, requests, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, requests))
            reasons = await asyncio.gather(*(_request(worker, workload, choose, number) for number in numbers))
            for reason in reasons:
                ends[reason] = ends.get(reason, 0) + 1
            resident.append((await worker.stats()).rss_bytes)
            if start % 100 == 0:
                print(f"{start + AT_ONCE} requests, {resident[-1] / MIB:.1f} MiB", file=sys.stderr, flush=True)
    finally:
        await worker.stop()
    return resident, ends


async def _request(worker: EngineWorker, workload: Workload, choose: random.Random, number: int) -> str:
    """Send one request; return its finish reason."""
    kind = choose.random()
    if kind < 0.5:
        prompt = [*workload.chat[: choose.randint(4, 25)], *choose.sample(workload.long, choose.randint(1, 30))]
    elif kind < 0.7:
        prompt = [*workload.prefix[: choose.choice((64, 128))], *choose.sample(workload.long, 8)]
    elif kind < 0.9:
        prompt = choose.choice(workload.copies)
    else:
        prompt = workload.long[: choose.randint(200, 900)]
    params = GenerationParams(
        max_tokens=choose.randint(1, 24),
        temperature=choose.choice((0.0, 0.7, 1.2)),
        seed=number,
        n=choose.choice((1, 1, 1, 2)),
        logprobs=choose.choice((None, None, 3)),
        stop=choose.choice(((), (), (".",))),
        repetition_penalty=choose.choice((1.0, 1.1)),
    )
    leaves_after = choose.choice((None, None, None, 0, 3))
    request_id, seen = f"soak-{number}", 0
    if leaves_after == 0:
        asyncio.get_running_loop().call_later(choose.random(), worker.cancel, request_id)
    async for event in worker.generate(request_id, Prompt(tokens=tuple(prompt)), params):
        if not isinstance(event, TextDelta):
            return event.finish_reason
        seen += 1
        if seen == leaves_after:
            worker.cancel(request_id)
    raise SystemExit(f"request {request_id} has no end")
