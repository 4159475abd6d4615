from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed, and can be told not to")
def test_freed_memory_goes_back_to_the_system() -> None:
    code = (
        "from lamplighter_agent.heap import trim_heap\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        # Small blocks, of which the last stays: the heap cannot shrink by itself.
        "blocks = [bytearray(2000) for _ in range(20_000)]\n"
        "kept = bytearray(2000)\n"
        "del blocks\n"
        "before = resident()\n"
        "print(trim_heap(), before - resident() > 8_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
