"""The child process of an engine worker: how it is started, and what its end means."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_OOM_SCORE_ADJUSTMENT: Final = "500"


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
    _offer_to_the_kernel(process.pid)
    return process


def why_ended(status: int) -> str:
    """Return in words what a process's exit status says, negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
    return f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


def _offer_to_the_kernel(pid: int) -> None:
    """Let the engine go before the agent when memory runs out, from its first moment.

    The adjustment counts in thousandths of the limit, of the machine or of the unit (``oom_badness`` in Linux's
    ``mm/oom_kill.c``). All of them would make a small engine the first to go of the whole machine, whoever took the
    memory; half is more than the agent has in any unit that holds an engine.
    """
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT, encoding="ascii")
    except OSError as error:
        logger.warning("the kernel may end the agent before the engine when memory runs out: %s", error)
