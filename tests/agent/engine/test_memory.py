from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lamplighter_agent.engine import cgroup, memory
from lamplighter_agent.engine.memory import (
    GUIDANCE_ENTRY_BYTES,
    MIB,
    RUNTIME_BYTES,
    TOKENIZER_ENTRY_BYTES,
    MachineMemory,
    plan_memory,
    read_machine_memory,
)
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.errors import IncompatiblePackageError, MemoryBudgetError
from lamplighter_agent.package.manifest import CacheScales, Manifest, decode_manifest
from support.file_tree import write_files
from support.manifests import manifest_tree

GIB = 1024 * MIB
WEIGHTS = 150 * MIB


def manifest(*, positions: int = 8192) -> Manifest:
    """Return a manifest of SmolLM2-135M's size: 45 KiB of cache a token."""
    tree = manifest_tree()
    tree["model"] |= {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": positions,
    }
    tree["memory"] = {
        "weights_bytes": WEIGHTS,
        "kv_bytes_per_token": {"float32": 46080},
        "prefill_scratch_bytes": 64 * MIB,
        "prefill_chunk_tokens": 512,
    }
    return decode_manifest(msgspec.json.encode(tree))


def with_scales() -> Manifest:
    layer = b"\0\0\x80\x3f" * (3 * 64)
    return msgspec.structs.replace(manifest(), cache_scales=CacheScales(key=(layer,) * 30, value=(layer,) * 30))


def machine(available: int, *, process: int = 0, limit: int | None = None) -> MachineMemory:
    return MachineMemory(available_bytes=available, process_bytes=process, limit_bytes=limit)


def test_a_large_machine_gets_the_default_slots_and_context() -> None:
    plan = plan_memory(manifest(), machine(16 * GIB), EngineOptions())
    assert (plan.slots, plan.max_context_tokens, plan.kv_tokens) == (4, 4096, 4 * 4096)
    assert plan.kv_bytes == 4 * 4096 * 46080
    assert plan.total_bytes + plan.headroom_bytes <= plan.budget_bytes


def test_the_grammar_engine_has_its_place_where_it_is_installed_and_leaves_a_good_context() -> None:
    large = msgspec.structs.replace(machine(1 * GIB), has_guidance=True)
    with_it, without = (plan_memory(manifest(), one, EngineOptions()) for one in (large, machine(1 * GIB)))
    assert (with_it.guidance_bytes, without.guidance_bytes) == (49152 * GUIDANCE_ENTRY_BYTES, 0)
    assert with_it.total_bytes + with_it.headroom_bytes <= with_it.budget_bytes
    small = msgspec.structs.replace(machine(300 * MIB), has_guidance=True)
    assert plan_memory(manifest(), small, EngineOptions()).guidance_bytes == 0
    assert plan_memory(manifest(), small, EngineOptions()).kv_tokens > 256


def test_a_small_machine_shares_fewer_tokens_between_its_slots() -> None:
    plan = plan_memory(manifest(), machine(384 * MIB), EngineOptions())
    assert plan.max_context_tokens == plan.kv_tokens < 4096
    assert plan.slots == min(4, plan.kv_tokens // 256)
    assert plan.total_bytes + plan.headroom_bytes <= 384 * MIB
    assert plan.budget_bytes - plan.total_bytes - plan.headroom_bytes < plan.kv_bytes_per_token


def test_the_configured_budget_bounds_the_plan() -> None:
    plan = plan_memory(manifest(), machine(16 * GIB), EngineOptions(memory_budget_bytes=300 * MIB))
    assert plan.budget_bytes == 300 * MIB
    assert plan.total_bytes + plan.headroom_bytes <= 300 * MIB


def test_a_budget_beyond_the_machine_does_not_help() -> None:
    plan = plan_memory(manifest(), machine(384 * MIB), EngineOptions(memory_budget_bytes=16 * GIB))
    assert plan.budget_bytes == 384 * MIB


def test_what_the_process_holds_already_counts_as_its_own() -> None:
    plan = plan_memory(manifest(), machine(300 * MIB, process=84 * MIB), EngineOptions())
    assert plan.budget_bytes == 384 * MIB


def test_prompts_on_an_int8_cache_are_unpacked_where_that_takes_nothing_from_the_caches() -> None:
    coded = EngineOptions(kv_cache_dtype="int8")
    large, small = (plan_memory(with_scales(), machine(size), coded) for size in (16 * GIB, 300 * MIB))
    assert (large.unpacked_bytes, small.unpacked_bytes) == (24 * 3 * 64 * 4096, 0)
    bare = msgspec.structs.replace(large, unpacked_bytes=0)
    assert large.total_bytes == bare.total_bytes + large.unpacked_bytes
    assert plan_memory(with_scales(), machine(16 * GIB), EngineOptions()).unpacked_bytes == 0


def test_a_small_budget_takes_an_int8_cache_where_the_package_has_scales() -> None:
    exact = plan_memory(manifest(), machine(300 * MIB), EngineOptions())
    coded = plan_memory(with_scales(), machine(300 * MIB), EngineOptions())
    assert (exact.kv_cache_dtype, coded.kv_cache_dtype) == ("float32", "int8")
    assert exact.max_context_tokens < 1024 < coded.max_context_tokens
    assert coded.kv_bytes_per_token == 11520
    assert coded.total_bytes + coded.headroom_bytes <= 300 * MIB


def test_a_good_context_stays_float32() -> None:
    assert plan_memory(with_scales(), machine(16 * GIB), EngineOptions()).kv_cache_dtype == "float32"


def test_a_configured_context_decides_about_the_cache() -> None:
    small, large = (
        plan_memory(with_scales(), machine(320 * MIB), EngineOptions(max_context_tokens=tokens, slots=1))
        for tokens in (512, 2048)
    )
    assert (small.kv_cache_dtype, large.kv_cache_dtype) == ("float32", "int8")


def test_a_configured_cache_is_kept_or_refused() -> None:
    chosen = plan_memory(with_scales(), machine(16 * GIB), EngineOptions(kv_cache_dtype="int8"))
    assert chosen.kv_cache_dtype == "int8"
    with pytest.raises(IncompatiblePackageError, match="no scales"):
        plan_memory(manifest(), machine(16 * GIB), EngineOptions(kv_cache_dtype="int8"))


def test_the_prefix_cache_takes_a_share_or_what_is_configured() -> None:
    plan = plan_memory(manifest(), machine(512 * MIB), EngineOptions())
    assert 0 < plan.prefix_cache_bytes <= (plan.kv_bytes + plan.prefix_cache_bytes) // 3
    assert plan.total_bytes + plan.headroom_bytes <= 512 * MIB
    assert plan_memory(manifest(), machine(16 * GIB), EngineOptions()).prefix_cache_bytes == 256 * MIB
    assert plan_memory(manifest(), machine(512 * MIB), EngineOptions(prefix_cache_bytes=0)).prefix_cache_bytes == 0


def test_a_groups_limit_is_never_exceeded_by_what_the_process_holds_already() -> None:
    plan = plan_memory(manifest(), machine(500 * MIB, process=40 * MIB, limit=512 * MIB), EngineOptions())
    assert plan.budget_bytes == 512 * MIB


def test_the_model_limits_the_context() -> None:
    plan = plan_memory(manifest(positions=512), machine(16 * GIB), EngineOptions(max_context_tokens=100_000))
    assert plan.max_context_tokens == 512


def test_scratch_follows_the_chunk() -> None:
    small, large = (
        plan_memory(manifest(), machine(16 * GIB), EngineOptions(prefill_chunk_tokens=chunk)).scratch_bytes
        for chunk in (128, 512)
    )
    assert large - small == 48 * MIB


def test_what_does_not_fit_is_refused_with_every_number() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(manifest(), machine(200 * MIB, process=7, limit=GIB), EngineOptions())
    message = caught.value.message
    runtime = RUNTIME_BYTES + 49152 * TOKENIZER_ENTRY_BYTES
    for part in (WEIGHTS, runtime, 256 * 46080, 200 * MIB, 200 * MIB + 7, GIB):
        assert str(part) in message
    assert caught.value.hint is not None


def test_a_configured_context_is_refused_rather_than_cut() -> None:
    with pytest.raises(MemoryBudgetError, match=str(4096 * 46080)):
        plan_memory(manifest(), machine(384 * MIB), EngineOptions(max_context_tokens=4096))


def test_cgroup_v2_limits_count_at_every_level(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box.slice/agent.service\n",
            "sys/fs/cgroup/box.slice/memory.max": "100000\n",
            "sys/fs/cgroup/box.slice/memory.current": "90000\n",
            "sys/fs/cgroup/box.slice/memory.stat": "anon 1\ninactive_file 5000\n",
            "sys/fs/cgroup/box.slice/agent.service/memory.max": "max\n",
            "sys/fs/cgroup/box.slice/agent.service/memory.current": "7\n",
        },
    )
    found = read_machine_memory(root)
    assert (found.limit_bytes, found.available_bytes) == (100000, 15000)


def test_cgroup_v1_limits_count_too(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/jobs/7\n0::/\n",
            "sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": "50000\n",
            "sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes": "60000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
        },
    )
    found = read_machine_memory(root)
    assert (found.limit_bytes, found.available_bytes) == (50000, 0)


def test_in_a_container_the_mount_point_stands_for_the_hosts_path(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../host/path\n",
            "sys/fs/cgroup/memory.max": "70000\n",
            "sys/fs/cgroup/memory.current": "10000\n",
        },
    )
    assert read_machine_memory(root).available_bytes == 60000


def test_without_cgroups_the_machine_alone_counts(tmp_path: Path) -> None:
    found = read_machine_memory(tmp_path)
    assert found.limit_bytes is None
    assert found.available_bytes > 0
    assert found.process_bytes > 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
    ids=["v2", "v2 without quota", "v1 less than a core", "v1 without quota"],
)
def test_cpu_quota_in_whole_cores(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    assert cgroup.quota_cores(write_files(tmp_path, files)) == cores


def test_there_is_always_a_core() -> None:
    assert memory.physical_cores() >= 1
