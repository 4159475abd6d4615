"""Which process the kernel ends first when memory runs out: the one that needs it, not the agent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_LEAST: Final = 500
_MOST: Final = 1000
"""Adjustments of the score: a child's at least, and the highest that there is."""


def offer_to_the_kernel(pid: int) -> None:
    """Let a child process go before the agent when memory runs out, from its first moment.

    The adjustment counts in thousandths of the limit, of the machine or of the unit (``oom_badness`` in Linux's
    ``mm/oom_kill.c``). All of them would make a small engine the first to go of the whole machine, whoever took the
    memory; half is more than the agent has in any unit that holds an engine. A container may have given the agent a
    high one already. Without this a child would have the agent's own, which as a service is never ended so.
    """
    try:
        own = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
        score = max(_LEAST, min(own + _LEAST, _MOST))
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score), encoding="ascii")
    except (OSError, ValueError) as error:
        logger.warning("the kernel may end the agent before process %d when memory runs out: %s", pid, error)
