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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc raises its bound by itself")
def test_large_blocks_leave_no_holes() -> None:
    code = (
        "from lamplighter_agent.heap import map_large_blocks\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "print(map_large_blocks())\n"
        "large = bytearray(4_000_000)\n"
        "del large\n"
        # Every second one stays, so that what goes are holes.
        "blocks = [bytearray(400_000) for _ in range(100)]\n"
        "before = resident()\n"
        "del blocks[::2]\n"
        "print(before - resident() > 18_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
