"""What a device remembers about its updates: the journal, the probation and the audit log, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamplighter_agent.update.audit import AUDIT_NAME, AuditLog
from lamplighter_agent.update.journal import JOURNAL_NAME, Journal
from lamplighter_agent.update.probation import PROBATION_NAME, ProbationBook, ProbationRules


@dataclass(frozen=True, slots=True)
class Ledger:
    """The three files of one state directory. One process has one ledger, shared by all who write to it.

    Attributes:
        journal: The update at work; changed only with the store's lock held.
        probation: The package that is new in use.
        audit: Who asked for what, and what happened.
    """

    journal: Journal
    probation: ProbationBook
    audit: AuditLog

    @classmethod
    def open(cls, state_dir: Path, rules: ProbationRules | None = None) -> Ledger:
        """Return the ledger of a state directory; nothing is written yet."""
        return cls(
            Journal(state_dir / JOURNAL_NAME),
            ProbationBook(state_dir / PROBATION_NAME, rules),
            AuditLog(state_dir / AUDIT_NAME),
        )
