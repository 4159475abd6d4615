"""The child process of an engine worker: how it is started, and what its end means."""

from __future__ import annotations

import asyncio
import signal
import sys

from lamplighter_agent.service.oom import offer_to_the_kernel


async def start_process(engine: str, log_level: int, channel: int) -> asyncio.subprocess.Process:
    """Start a worker.

    Args:
        engine: ``module:function`` that loads the engine in the child.
        log_level: Level of its log, as the logging module counts.
        channel: File descriptor of its end of the channel.

    Raises:
        OSError: If it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lamplighter_agent.service.worker_main",
        f"--fd={channel}",
        f"--engine={engine}",
        f"--log-level={log_level}",
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=(channel,),
        start_new_session=True,  # a Ctrl-C in a terminal is the agent's to handle
    )
    offer_to_the_kernel(process.pid)
    return process


def why_ended(status: int) -> str:
    """Return in words what a process's exit status says, negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    return f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
