"""Probation: a package that is new in use must serve for a while before it is trusted.

What counts against it: the engine crashed or hung, or could not be started; or the agent itself was cut off before
the package had served for a moment, which is how a package looks that takes the whole device down. The count is kept
on the disk, so that it also grows across restarts and power cuts. A power cut after the package has served for a
moment is not held against it.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final, Literal

import msgspec

from lamplighter_agent.errors import StoreError
from lamplighter_agent.package.durable import remove_file, storage_errors, write_file
from lamplighter_agent.update.states import Desired, PackageRef

logger = logging.getLogger(__name__)

PROBATION_NAME: Final = "probation.json"
_PROOF_S: Final = 30.0
_MAX_BYTES: Final = 64 * 1024

ProbationVerdict = Literal["none", "continues", "passed", "failed"]


class ProbationRules(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how strict.

    Attributes:
        seconds: Time that the package must have served, all runs together.
        max_failures: Failures with which it is rolled back.
    """

    seconds: float = 600.0
    max_failures: int = 3


class Probation(msgspec.Struct, frozen=True, kw_only=True):
    """A package on probation. Pure: every change is a new value.

    Attributes:
        reference: Which package.
        before: The package to go back to, or None if there was none.
        manifest_sha256: Digest of its manifest.
        desired: The request that brought it.
        failures: What counts against it so far.
        served_s: How long it has served.
        unproven: True until it has served for a moment in the agent's present run.
        last_failure: One sentence about the latest failure.
    """

    reference: PackageRef
    before: PackageRef | None
    manifest_sha256: str
    desired: Desired
    failures: int = 0
    served_s: float = 0.0
    unproven: bool = True
    last_failure: str = ""

    def after_start(self) -> Probation:
        """The agent starts: was it cut off before the package had served for a moment?"""
        if not self.unproven:
            return msgspec.structs.replace(self, unproven=True)
        return self.after_failure("the agent was cut off before the package had served for a moment")

    def after_failure(self, message: str) -> Probation:
        """The engine crashed, hung or could not be started."""
        return msgspec.structs.replace(self, failures=self.failures + 1, last_failure=message)

    def after_serving(self, seconds: float) -> Probation:
        """It has served for some more seconds without a break."""
        served_s = self.served_s + seconds
        return msgspec.structs.replace(self, served_s=served_s, unproven=False)

    def after_stop(self) -> Probation:
        """The agent ends in an orderly way."""
        return msgspec.structs.replace(self, unproven=False)

    def verdict(self, rules: ProbationRules) -> ProbationVerdict:
        """Judge it: failures first."""
        if self.failures >= rules.max_failures:
            return "failed"
        return "passed" if self.served_s >= rules.seconds else "continues"


class ProbationBook:
    """The file that keeps the probation; it may be used from several threads.

    A disk that takes no writes is no reason to stop: the count then goes on in memory.

    Args:
        path: The file; its directory exists when something is written.
        rules: How long and how strict.
    """

    def __init__(self, path: Path, rules: ProbationRules | None = None) -> None:
        self._path = path
        self._rules = rules or ProbationRules()
        self._lock = threading.Lock()
        self._unsaved_s = 0.0
        self._probation = self._read()

    @property
    def probation(self) -> Probation | None:
        """The package on probation, or None."""
        return self._probation

    def begin(self, probation: Probation) -> None:
        """Put a package on probation, in place of any other.

        Raises:
            StoreError: If it cannot be kept: then the package must not be activated.
        """
        with self._lock, storage_errors(f"writing {self._path}"):
            write_file(self._path, msgspec.json.encode(probation))
            self._probation, self._unsaved_s = probation, 0.0

    def end(self) -> None:
        """End the probation, whatever came of it."""
        with self._lock:
            self._keep(None)

    def note_start(self) -> ProbationVerdict:
        """Note that the agent starts, before the package is loaded."""
        with self._lock:
            return self._change(self._probation.after_start() if self._probation else None)

    def note_failure(self, message: str) -> ProbationVerdict:
        """Note that the engine crashed, hung or could not be started."""
        with self._lock:
            return self._change(self._probation.after_failure(message) if self._probation else None)

    def note_serving(self, seconds: float) -> ProbationVerdict:
        """Note that the package has served; short times are put together before they are written."""
        with self._lock:
            if self._probation is None:
                return "none"
            self._unsaved_s += seconds
            rest_s = self._rules.seconds - self._probation.served_s
            if self._unsaved_s < min(_PROOF_S, rest_s):
                return "continues"
            served_s, self._unsaved_s = self._unsaved_s, 0.0
            return self._change(self._probation.after_serving(served_s))

    def note_stop(self) -> None:
        """Note that the agent ends in an orderly way."""
        with self._lock:
            self._change(self._probation.after_stop() if self._probation else None)

    def _change(self, probation: Probation | None) -> ProbationVerdict:
        if probation is None:
            return "none"
        verdict = probation.verdict(self._rules)
        self._keep(None if verdict == "passed" else probation)
        return verdict

    def _keep(self, probation: Probation | None) -> None:
        if probation == self._probation:
            return
        self._probation = probation
        try:
            with storage_errors(f"writing {self._path}"):
                if probation is None:
                    remove_file(self._path)
                else:
                    write_file(self._path, msgspec.json.encode(probation))
        except StoreError as error:
            logger.warning("the probation is not kept: %s", error)

    def _read(self) -> Probation | None:
        try:
            if not self._path.is_file() or self._path.stat().st_size > _MAX_BYTES:
                return None
            return msgspec.json.decode(self._path.read_bytes(), type=Probation)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be read: %s", self._path, error)
            return None
