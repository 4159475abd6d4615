"""Everything around an update: keys, a published repository, a server, a store, and a service that records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update import clock
from lamplighter_agent.update.compatibility import DeviceFacts
from lamplighter_agent.update.downloader import DownloadOptions, HttpSource
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.interrupt import Interrupt
from lamplighter_agent.update.sources import Source
from lamplighter_agent.update.states import Desired, PackageRef, UpdatePolicy, UpdateReport
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trial import TrialMeasurement
from lamplighter_agent.update.updater import Updater
from lamplighter_fleet.keys import KeyDirectory
from lamplighter_fleet.publish import Publication, publish_package
from lamplighter_fleet.repository import Expiry, Repository
from support.package_server import PackageServer
from support.packages import write_package

PATIENT = DownloadOptions(timeout_s=5, retries=2, backoff_s=0.0, low_speed_bytes_per_s=0)
DEVICE = DeviceFacts(agent_version="0.1.0", onnxruntime_version="1.31.1", memory_bytes=10**9)
GOOD_TRIAL = TrialMeasurement(self_test_tokens=((3, 4, 5),), load_s=0.1, generated_tokens_per_s=50.0)


@dataclass
class Service:
    """The rest of the agent: it records what it is told, and fails where a test says so."""

    measurement: TrialMeasurement = GOOD_TRIAL
    prepare_error: Exception | None = None
    trial_error: BaseException | None = None
    activate_error: Exception | None = None
    prepared: list[Path] = field(default_factory=list)
    tried: list[Path] = field(default_factory=list)
    activated: list[str] = field(default_factory=list)
    reports: list[UpdateReport] = field(default_factory=list)
    on_report: Callable[[UpdateReport], None] = lambda report: None

    def hooks(self) -> UpdateHooks:
        return UpdateHooks(prepare=self._prepare, trial=self._trial, activate=self._activate, report=self._report)

    def states(self) -> list[str]:
        """Return the states reported, each once where it was repeated with progress."""
        states: list[str] = []
        for report in self.reports:
            if states[-1:] != [report.state.value]:
                states.append(report.state.value)
        return states

    def _prepare(self, path: Path, _: Manifest, interrupt: Interrupt) -> None:
        self.prepared.append(path)
        if self.prepare_error is not None:
            raise self.prepare_error

    def _trial(self, path: Path, _: Manifest, interrupt: Interrupt) -> TrialMeasurement:
        self.tried.append(path)
        if self.trial_error is not None:
            raise self.trial_error
        return self.measurement

    def _activate(self, reference: PackageRef, interrupt: Interrupt) -> None:
        if self.activate_error is not None:
            raise self.activate_error
        self.activated.append(str(reference))

    def _report(self, report: UpdateReport) -> None:
        self.reports.append(report)
        self.on_report(report)


@dataclass
class World:
    """One device and one repository.

    Attributes:
        path: A directory of the test's own.
        keys: The operator's keys.
        server: Serves the repository.
        service: The rest of the agent.
    """

    path: Path
    keys: KeyDirectory
    server: PackageServer
    service: Service = field(default_factory=Service)

    @property
    def repository_dir(self) -> Path:
        return self.path / "repository"

    @property
    def store(self) -> Store:
        return Store(self.path / "state", reserve_bytes=0)

    def repository(self, expiry: Expiry | None = None) -> Repository:
        return Repository(self.repository_dir, self.keys, expiry)

    def publish(
        self,
        version: str = "1.0.0",
        *,
        weights_seed: int = 1,
        change: Callable[[dict[str, Any]], None] = lambda tree: None,
    ) -> Publication:
        """Write and publish ``tiny/version``."""
        package = self.path / "built" / version
        write_package(package, version=version, weights_seed=weights_seed, change=change)
        return publish_package(package, self.repository())

    def updater(
        self,
        *,
        source: Source | None = None,
        root: bytes | None = None,
        device: DeviceFacts = DEVICE,
        download: DownloadOptions = PATIENT,
        store: Store | None = None,
        options: UpdateOptions | None = None,
        now: Callable[[], datetime] = clock.now,
    ) -> Updater:
        return Updater(
            store or self.store,
            source or HttpSource(self.server.url, timeout_s=download.timeout_s),
            root=root or self.keys.root(),
            device=device,
            hooks=self.service.hooks(),
            options=options or UpdateOptions(download=download, progress_interval_s=0.05),
            now=now,
        )

    def install(self, version: str = "1.0.0", *, weights_seed: int = 1) -> None:
        """Publish and apply a version, then forget what was recorded."""
        self.publish(version, weights_seed=weights_seed)
        outcome = self.updater().apply(desired(version, id=f"install-{version}"))
        assert outcome.succeeded, outcome.report
        self.forget()

    def forget(self) -> None:
        self.service.reports.clear()
        self.service.activated.clear()
        self.service.tried.clear()
        self.server.exchanges.clear()

    def current(self) -> str | None:
        current = self.store.current()
        return None if current is None else str(current.reference)


def desired(version: str = "1.0.0", *, id: str = "one", policy: UpdatePolicy | None = None) -> Desired:
    return Desired(package="tiny", version=version, id=id, policy=policy or UpdatePolicy())


@contextmanager
def make_world(path: Path, keys: KeyDirectory) -> Iterator[World]:
    (path / "repository").mkdir()
    with PackageServer(path / "repository") as server:
        yield World(path, keys, server)


class PowerCut(BaseException):
    """Ends the process as far as the code under test can tell: nothing catches it."""
