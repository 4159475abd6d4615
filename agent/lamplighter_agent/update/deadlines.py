"""How long each state of an update may take."""

from __future__ import annotations

import msgspec

from lamplighter_agent.update.states import UpdateState


class StateDeadlines(msgspec.Struct, frozen=True, kw_only=True):
    """Longest time of each state, in seconds.

    What a deadline ends is reported as ``deadline_passed``. A download that ran out of time goes on later where it
    stopped; a package that ran out of time while it was prepared or tried counts as failed.
    """

    checking_s: float = 600.0
    downloading_s: float = 86_400.0
    verifying_s: float = 3_600.0
    preparing_s: float = 3_600.0
    trying_s: float = 1_800.0
    activating_s: float = 900.0
    waiting_s: float = 14 * 86_400.0

    def of(self, state: UpdateState) -> float:
        """Return the deadline of a state."""
        match state:
            case UpdateState.DOWNLOADING:
                return self.downloading_s
            case UpdateState.VERIFYING:
                return self.verifying_s
            case UpdateState.PREPARING:
                return self.preparing_s
            case UpdateState.TRYING:
                return self.trying_s
            case UpdateState.ACTIVATING:
                return self.activating_s
            case UpdateState.WAITING:
                return self.waiting_s
            case _:
                return self.checking_s
