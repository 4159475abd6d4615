"""Which process the kernel ends first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RAISE_AND_OFFER = """
import subprocess, sys
from pathlib import Path
from lamplighter_agent.service.oom import offer_to_the_kernel
Path("/proc/self/oom_score_adj").write_text(sys.argv[1])
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
offer_to_the_kernel(child.pid)
print(Path(f"/proc/{child.pid}/oom_score_adj").read_text())
child.communicate()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("own", "child"), [(100, 600), (700, 1000), (1000, 1000)])
def test_a_child_goes_before_an_agent_whose_own_score_a_container_raised(own: int, child: int) -> None:
    before = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    if own < before:
        pytest.skip("the score cannot be lowered to what is tried")
    done = subprocess.run([sys.executable, "-c", RAISE_AND_OFFER, str(own)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == child
