"""The words of an update: what is wanted, where it stands, how it ended. Pure data, shared with the service.

An update goes ``received → checking → downloading → verifying → waiting → preparing → trying → activating → active``,
``waiting`` only where there is a maintenance window. It ends
in ``active``, ``rolled_back`` (it was switched on and switched back), ``failed``, ``rejected`` (this device will not
run it) or ``cancelled``. Values are part of the protocol: they never change once released.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.layout import check_name
from lamplighter_agent.package.limits import TrialLimits as TrialLimits
from lamplighter_agent.update.window import WindowText


class UpdateState(StrEnum):
    """Where an update stands."""

    RECEIVED = "received"
    CHECKING = "checking"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    WAITING = "waiting"
    PREPARING = "preparing"
    TRYING = "trying"
    ACTIVATING = "activating"
    ACTIVE = "active"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """True if nothing follows."""
        return self in _FINAL


_FINAL = frozenset(
    {UpdateState.ACTIVE, UpdateState.ROLLED_BACK, UpdateState.FAILED, UpdateState.REJECTED, UpdateState.CANCELLED}
)


class PackageRef(msgspec.Struct, frozen=True, order=True):
    """A package and its version; both are checked, so that they may become part of a path.

    Raises:
        ManifestError: On construction, if either is not allowed as a path component.
    """

    name: str
    version: str

    def __post_init__(self) -> None:
        check_name(self.name, "package name")
        check_name(self.version, "package version")

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @classmethod
    def parse(cls, text: str) -> PackageRef:
        """Read ``name/version``.

        Raises:
            ManifestError: If it is anything else.
        """
        name, slash, version = text.partition("/")
        if not slash:
            raise ManifestError(f"package reference {text[:200]!r} is not 'name/version'")
        return cls(name, version)


class UpdatePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How to carry an update out.

    Attributes:
        limits: Thresholds of the trial.
        retry_failed: Try a version again that failed here before although its manifest is the same.
        window: Time of day in which the package may be tried and activated, in place of the device's own; it is
            fetched at once. None: the device's own.
        urgent: Do not wait for any window.
    """

    limits: TrialLimits = TrialLimits()
    retry_failed: bool = False
    window: WindowText | None = None
    urgent: bool = False


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet wants this device to run.

    Attributes:
        package: Name of a signed package.
        version: Its version.
        id: Identity of the request; a request with the id of a finished one only has its result told again.
        requested_by: Who asked, for the log.
    """

    package: str
    version: str
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    policy: UpdatePolicy = UpdatePolicy()
    requested_by: Annotated[str, Meta(max_length=128)] = ""

    def __str__(self) -> str:
        return f"{self.package}/{self.version}"

    @property
    def reference(self) -> PackageRef:
        """Package and version as one value, checked.

        Raises:
            ManifestError: If either is not allowed as a path component.
        """
        return PackageRef(self.package, self.version)


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an update as it is reported.

    Attributes:
        id: ``Desired.id``.
        state: Where it stands.
        package: The wanted package.
        version: The wanted version.
        active: ``name/version`` of the package in use, or None.
        bytes_done: Bytes of the package that are on this device.
        bytes_total: Bytes of the package, or 0 while unknown.
        reason: Stable code when it did not succeed, otherwise None.
        detail: Stable code of the rule that a trial broke, or None.
        message: One sentence for a person, or None.
        hint: What to do about it, or None.
        file: The file or metadata role at fault, or None.
        warning: ``clock_behind`` or ``clock_ahead`` where this device's clock cannot be right, otherwise None.
        duration_s: Seconds since this attempt began.
        state_s: Seconds spent in each state of this attempt so far.
    """

    id: str
    state: UpdateState
    package: str
    version: str
    active: str | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    reason: str | None = None
    detail: str | None = None
    message: str | None = None
    hint: str | None = None
    file: str | None = None
    warning: str | None = None
    duration_s: float = 0.0
    state_s: dict[str, float] = {}

    @property
    def progress(self) -> float:
        """Share of the bytes that are on this device, 0 to 1."""
        return self.bytes_done / self.bytes_total if self.bytes_total else 0.0


class UpdateOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an update ended.

    Attributes:
        report: The last report; its state is final, unless the update waits for its window, or the agent's own end
            suspended it.
        changed: True if another package is in use than before.
    """

    report: UpdateReport
    changed: bool

    @property
    def succeeded(self) -> bool:
        """True if the wanted package is in use."""
        return self.report.state is UpdateState.ACTIVE
