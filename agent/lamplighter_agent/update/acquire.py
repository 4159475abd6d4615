"""The first half of an update: from a signed name to a verified package directory in the store."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from lamplighter_agent.errors import (
    ClockError,
    DiskFullError,
    DownloadError,
    ExpiredMetadataError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    PackageError,
    TrialFailedError,
)
from lamplighter_agent.package.durable import storage_errors
from lamplighter_agent.package.layout import MANIFEST_NAME
from lamplighter_agent.package.manifest import FileEntry, Manifest, decode_manifest, read_manifest_bytes
from lamplighter_agent.package.onnx_scan import check_graph
from lamplighter_agent.update.attempt import Attempt
from lamplighter_agent.update.clock import ClockVerdict
from lamplighter_agent.update.compatibility import DeviceFacts, check_compatible
from lamplighter_agent.update.downgrade import check_downgrade, read_permission
from lamplighter_agent.update.downloader import Downloader
from lamplighter_agent.update.installed import InstalledPackage
from lamplighter_agent.update.states import PackageRef, UpdateState
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trust import SignedFile, TrustedRepository

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Acquirer:
    """Brings one package into the store.

    Attributes:
        store: Where it goes.
        downloader: Reads the repository; it ends with ``attempt.interrupt``.
        repository: Says what is signed.
        device: What this device offers.
        clock: Whether this device's clock can be right.
        moment: What it showed.
        parallel_downloads: Files fetched at once.
        progress_interval_s: Time between two progress reports.
    """

    store: Store
    downloader: Downloader
    repository: TrustedRepository
    device: DeviceFacts
    clock: ClockVerdict
    moment: datetime
    parallel_downloads: int
    progress_interval_s: float

    def obtain(self, attempt: Attempt) -> InstalledPackage:
        """Check, download and verify what the attempt wants, and return the staged package.

        Raises:
            PackageError: If it is not signed, not whole, not for this device, a downgrade, or failed here before.
            DownloadError: If it cannot be fetched.
            StoreError: If the disk is full or refuses.
            ClockError: If the clock is wrong and signatures look expired because of it.
            UpdateCancelledError: If the attempt was cancelled.
            UpdateDeadlineError: If a state took too long.
        """
        attempt.enter(UpdateState.CHECKING)
        reference = attempt.desired.reference
        manifest_bytes, custom = self._fetch_manifest(attempt)
        attempt.manifest_sha256 = hashlib.sha256(manifest_bytes).hexdigest()
        manifest = decode_manifest(manifest_bytes, origin=f"{reference}/{MANIFEST_NAME}")
        if manifest.reference != str(reference):
            raise ManifestError(f"the manifest signed as {reference} describes {manifest.reference}")
        attempt.file = None
        failed = attempt.failure_before()
        if failed is not None and not attempt.desired.policy.retry_failed:
            raise TrialFailedError(
                f"{manifest.reference} failed on this device before: {failed.message}",
                hint="publish it changed, under a new version, or ask for it with policy.retry_failed",
                detail="failed_before",
            )
        permission = read_permission(custom)
        check_downgrade(reference, attempt.highest, permission)
        if attempt.highest in permission.replaces:
            attempt.permit_downgrade(reference)
        check_compatible(manifest, self.device)
        self._make_room(manifest)
        # A blob of an earlier version may have rotted on the disk: what is found damaged is fetched once more.
        try:
            return self._fetch_and_stage(attempt, manifest, manifest_bytes)
        except (HashMismatchError, MissingFileError) as error:
            if attempt.step is not UpdateState.VERIFYING:
                raise
            logger.warning("%s; fetching it again", error)
            return self._fetch_and_stage(attempt, manifest, manifest_bytes)

    def _fetch_manifest(self, attempt: Attempt) -> SignedFile:
        """Return what is signed now; for a package that waits here, verified, what was signed when it came will do."""
        reference = attempt.desired.reference
        known = self._known_manifest(reference)
        try:
            signed = self.repository.fetch_manifest(reference, known=known)
        except DownloadError as error:
            if known is None or hashlib.sha256(known).hexdigest() != attempt.staged_sha256:
                raise
            logger.warning("going on with what was verified when it came: %s", error)
            return SignedFile(known, None)
        except ExpiredMetadataError as error:
            if self.clock.code != "clock_ahead":
                raise
            raise ClockError(f"{self.clock.message}: {error.message}", hint="set this device's clock") from error
        finally:
            attempt.file = self.repository.last_file
        if self.clock.code != "clock_behind":
            attempt.confirm_clock(self.moment)
        return signed

    def _known_manifest(self, reference: PackageRef) -> bytes | None:
        try:
            return read_manifest_bytes(self.store.package(reference).path)
        except PackageError:
            return None

    def _make_room(self, manifest: Manifest) -> None:
        """Check that package and prepared weights fit, removing what is not needed if they do not."""
        extra_bytes = manifest.memory.weights_bytes
        steps: tuple[Callable[[], None], ...] = (
            partial(self.store.prune, keep_blobs_of=manifest),
            self.store.drop_previous,
        )
        for remove in steps:
            try:
                self.store.blobs.preflight(manifest, extra_bytes=extra_bytes)
            except DiskFullError as error:
                logger.info("pruning the store: %s", error)
                remove()
            else:
                return
        self.store.prune(keep_blobs_of=manifest)
        self.store.blobs.preflight(manifest, extra_bytes=extra_bytes)

    def _fetch_and_stage(self, attempt: Attempt, manifest: Manifest, manifest_bytes: bytes) -> InstalledPackage:
        attempt.enter(UpdateState.DOWNLOADING)
        try:
            self._download(attempt, manifest)
        except DiskFullError:
            self.store.blobs.discard_parts(manifest)
            raise
        attempt.enter(UpdateState.VERIFYING)
        package = self.store.stage(manifest_bytes)
        try:
            for entry in manifest.files:
                attempt.file = entry.name
                attempt.interrupt.run(partial(self.store.verify, package, only={entry.name}), f"verifying {entry.name}")
        except (HashMismatchError, MissingFileError):
            self.store.discard_bad_files(package)
            raise
        model = manifest.file("model").name
        attempt.file = model
        with storage_errors(f"reading {package.path / model}"):
            names = frozenset(entry.name for entry in manifest.files)
            check_graph(package.path / model, self.device.operator_domains, names)
        attempt.file = None
        attempt.staged_sha256 = attempt.manifest_sha256
        return package

    def _download(self, attempt: Attempt, manifest: Manifest) -> None:
        missing = self.store.blobs.missing(manifest)
        arrived = _Arrived(self.store.blobs.bytes_present(manifest), manifest.total_bytes)
        attempt.progress(*arrived.figures())
        if not missing:
            return
        transfers = attempt.interrupt.child()
        fetch = partial(self._download_blob, self.downloader.until(transfers), arrived)
        with ThreadPoolExecutor(self.parallel_downloads, thread_name_prefix="download") as pool:
            futures = {pool.submit(fetch, entry): entry for entry in missing}
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=self.progress_interval_s, return_when=FIRST_EXCEPTION)
                if failed := next((future for future in done if future.exception() is not None), None):
                    transfers.cancel()  # the attempt ends with the first failure
                    for future in waiting:
                        future.cancel()
                    attempt.file = futures[failed].name
                    failed.result()
                attempt.progress(*arrived.figures())

    def _download_blob(self, downloader: Downloader, arrived: _Arrived, entry: FileEntry) -> None:
        repository_path = f"blobs/sha256/{entry.sha256}"
        downloader.fetch_file(
            repository_path, entry, self.store.blobs.path(entry), partial(arrived.count, entry.sha256)
        )


class _Arrived:
    """Bytes of the package that are here, counted from several threads."""

    def __init__(self, present: int, total: int) -> None:
        self._lock = threading.Lock()
        self._present, self._total = present, total
        self._first: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def count(self, sha256: str, count: int) -> None:
        """Note that a blob has ``count`` bytes now; the first count is what an earlier attempt had left."""
        with self._lock:
            self._first.setdefault(sha256, count)
            self._counts[sha256] = count

    def figures(self) -> tuple[int, int]:
        """Return the bytes that are here and the bytes of the whole package."""
        with self._lock:
            fetched = sum(self._counts.values()) - sum(self._first.values())
            return min(self._present + fetched, self._total), self._total
