"""The memory plan under a real limit: the kernel ends a process that exceeds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamplighter_agent.engine.memory import MIB
from lamplighter_agent.engine.prepare import prepare
from support.cgroups import memory_group

TESTS = Path(__file__).parent.parent


def forget_cached_pages(directory: Path) -> None:
    """Take a directory's files out of the page cache, so that the group that reads them next is charged for them."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("limit_mb", "dtype"), [(256, "int8"), (512, "float32"), (2048, "float32")])
def test_the_engine_keeps_to_its_plan_under_a_real_limit(
    smollm2_package: Path, tmp_path: Path, limit_mb: int, dtype: str
) -> None:
    prepared = prepare(smollm2_package, tmp_path)
    for directory in (smollm2_package, prepared):
        forget_cached_pages(directory)
    with memory_group(limit_mb * MIB) as group:
        command = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        probe = [sys.executable, "-m", "support.budget_probe", str(smollm2_package), str(tmp_path)]
        result = subprocess.run(
            ["/bin/sh", "-c", command, str(group.directory), *probe],
            cwd=TESTS,
            capture_output=True,
            text=True,
            timeout=1700,
            check=False,
        )
        assert (result.returncode, group.kills) == (0, 0), result.stderr
    answer = json.loads(result.stdout)
    plan, used = answer["report"]["plan"], answer["report"]["used"]
    assert answer["prepared"]
    assert plan["kv_cache_dtype"] == dtype
    assert plan["budget_bytes"] <= limit_mb * MIB
    assert answer["report"]["planned_bytes"] + plan["headroom_bytes"] <= plan["budget_bytes"]
    assert used["peak_resident_bytes"] <= plan["budget_bytes"]
    assert answer["prefix_bytes"] <= plan["prefix_cache_bytes"]
