"""Which process the kernel ends first when memory runs out: the one that needs it, not the agent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_OOM_SCORE_ADJUSTMENT: Final = "500"


def offer_to_the_kernel(pid: int) -> None:
    """Let a child process go before the agent when memory runs out, from its first moment.

    The adjustment counts in thousandths of the limit, of the machine or of the unit (``oom_badness`` in Linux's
    ``mm/oom_kill.c``). All of them would make a small engine the first to go of the whole machine, whoever took the
    memory; half is more than the agent has in any unit that holds an engine. Without it a child would have the agent's
    own, which as a service is never ended so.
    """
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT, encoding="ascii")
    except OSError as error:
        logger.warning("the kernel may end the agent before process %d when memory runs out: %s", pid, error)
