"""What an updater is given: the rest of the agent as functions, and how to carry updates out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lamplighter_agent.package.limits import TrialLimits
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update.deadlines import StateDeadlines
from lamplighter_agent.update.downloader import DownloadOptions
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.states import PackageRef, UpdateReport
from lamplighter_agent.update.trial import TrialMeasurement


@dataclass(frozen=True, slots=True)
class UpdateHooks:
    """What the rest of the agent does for an update.

    Each of the first three gets the update's interrupt and must end soon after it is set; one that does not is left
    behind.

    Attributes:
        prepare: Makes derived files for this CPU from a staged package.
        trial: Starts a candidate worker on a staged package, runs the manifest's self-tests and measures.
        activate: Switches the service over to a package that `Store.current` already names. When it raises, the
            service is still, or again, on the package that it had before.
        report: Is told every change of state and, about once a second, progress.
    """

    prepare: Callable[[Path, Manifest, Interrupt], None]
    trial: Callable[[Path, Manifest, Interrupt], TrialMeasurement]
    activate: Callable[[PackageRef, Interrupt], None]
    report: Callable[[UpdateReport], None]


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How updates are carried out.

    Attributes:
        download: How patient and how greedy a download is.
        parallel_downloads: Files fetched at once.
        keep_packages: Installed packages kept besides the one in use; the previous one is always among them.
        progress_interval_s: Time between two progress reports.
        deadlines: Longest time of each state.
        limits: What this device asks of every package, besides what the manifest and the request ask.
        hook_grace_s: Time for a hook to end by itself once the update must end; then it is left behind.
        window: Time of day in which a package may be tried and activated, or None for any time.
    """

    download: DownloadOptions = field(default_factory=DownloadOptions)
    parallel_downloads: int = 2
    keep_packages: int = 1
    progress_interval_s: float = 1.0
    deadlines: StateDeadlines = field(default_factory=StateDeadlines)
    limits: TrialLimits = field(default_factory=TrialLimits)
    hook_grace_s: float = 10.0
    window: str | None = None
