"""The memory plan next to what is really used, for ``/health`` and the doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.config import EngineConfig
from lamplighter_agent.engine.memory import MIB, MemoryPlan
from lamplighter_agent.engine.options import EngineOptions

_FIELDS: Final = {
    "VmRSS": "resident_bytes",
    "VmHWM": "peak_resident_bytes",
    "RssAnon": "anonymous_bytes",
    "RssFile": "mapped_bytes",
}


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a process holds.

    Attributes:
        resident_bytes: All of it.
        peak_resident_bytes: The most that it ever was.
        anonymous_bytes: Its own memory.
        mapped_bytes: Pages of files, prepared weights and libraries: the kernel can read them again.
    """

    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    anonymous_bytes: int = 0
    mapped_bytes: int = 0


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """A plan, and what the engine's process holds of it."""

    plan: MemoryPlan
    planned_bytes: int
    used: MemoryUse


def engine_options(config: EngineConfig) -> EngineOptions:
    """Return the engine's options as the configuration says."""
    return EngineOptions(
        memory_budget_bytes=None if config.memory_budget_mb is None else config.memory_budget_mb * MIB,
        max_context_tokens=config.max_context_tokens,
        slots=config.slots,
        threads=config.threads,
        kv_cache_dtype=config.kv_cache_dtype,
        speculation=config.speculation,
        prompt_weights=config.prompt_weights,
        prefix_cache_bytes=None if config.prefix_cache_mb is None else config.prefix_cache_mb * MIB,
        prefix_disk_bytes=config.prefix_disk_mb * MIB,
        pinned_prompts=config.pinned_prompts,
    )


def memory_report(plan: MemoryPlan | None, pid: int | None) -> MemoryReport | None:
    """Return the plan of the engine that runs, next to what its process holds; None if there is none."""
    if plan is None or pid is None:
        return None
    return MemoryReport(plan=plan, planned_bytes=plan.total_bytes, used=process_memory(pid))


def process_memory(pid: int) -> MemoryUse:
    """Read what a process holds; zeros if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return MemoryUse()
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            sizes[_FIELDS[name]] = int(value.split()[0]) * 1024
    return MemoryUse(**sizes)


def plan_text(plan: MemoryPlan) -> str:
    """Return a plan in one line, in MiB."""
    parts = (
        ("runtime", plan.runtime_bytes),
        ("weights", plan.weights_bytes),
        ("scratch", plan.scratch_bytes),
        (f"{plan.kv_cache_dtype} KV cache", plan.kv_bytes),
        ("prefix cache", plan.prefix_cache_bytes),
        *((("unpacked keys", plan.unpacked_bytes),) if plan.unpacked_bytes else ()),
        *((("grammars", plan.guidance_bytes),) if plan.guidance_bytes else ()),
    )
    named = ", ".join(f"{name} {size / MIB:.0f}" for name, size in parts)
    return (
        f"{plan.total_bytes / MIB:.0f} MiB of {plan.budget_bytes / MIB:.0f} ({named}) for {plan.slots} slots of "
        f"{plan.max_context_tokens} tokens, {plan.kv_tokens} together"
    )
