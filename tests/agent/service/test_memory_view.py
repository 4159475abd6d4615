from __future__ import annotations

import os

import msgspec

from lamplighter_agent.config import EngineConfig
from lamplighter_agent.engine.memory import MIB
from lamplighter_agent.service.memory_view import engine_options, memory_report, plan_text, process_memory
from support.toy_engine import memory_plan


def test_what_a_process_holds_is_read_from_the_kernel() -> None:
    used = process_memory(os.getpid())
    assert used.peak_resident_bytes >= used.resident_bytes > 10 * MIB
    assert used.anonymous_bytes + used.mapped_bytes <= used.resident_bytes + MIB


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert process_memory(2**22 + 1).resident_bytes == 0


def test_the_report_has_the_plan_and_the_use() -> None:
    plan = memory_plan()
    report = memory_report(plan, os.getpid())
    assert report is not None
    assert report.plan == plan
    assert report.planned_bytes == plan.total_bytes
    assert memory_report(None, os.getpid()) is None
    assert memory_report(plan, None) is None


def test_a_plan_is_told_in_one_line() -> None:
    plan = msgspec.structs.replace(
        memory_plan(slots=2, context=1024, kv_tokens=1536, prefixes=4 * MIB),
        budget_bytes=256 * MIB,
        weights_bytes=100 * MIB,
        kv_bytes_per_token=MIB // 64,
        kv_cache_dtype="int8",
    )
    assert plan_text(plan) == (
        "128 MiB of 256 (runtime 0, weights 100, scratch 0, int8 KV cache 24, prefix cache 4) "
        "for 2 slots of 1024 tokens, 1536 together"
    )


def test_every_setting_of_the_engine_reaches_it() -> None:
    options = engine_options(
        EngineConfig(
            memory_budget_mb=3,
            threads=2,
            max_context_tokens=99,
            slots=5,
            kv_cache_dtype="int8",
            prefix_cache_mb=0,
            prefix_disk_mb=7,
            pinned_prompts=("Be brief.",),
        )
    )
    assert (options.memory_budget_bytes, options.threads, options.max_context_tokens, options.slots) == (
        3 * MIB,
        2,
        99,
        5,
    )
    assert (options.kv_cache_dtype, options.prefix_cache_bytes, options.prefix_disk_bytes) == ("int8", 0, 7 * MIB)
    assert options.pinned_prompts == ("Be brief.",)
