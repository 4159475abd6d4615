"""The error tree: families by who must act, each with a stable reason code and an exit code.

``reason`` is part of the protocol (``reported`` messages, JSON output): it never changes once released.
``exit_code`` is the process's exit status when the error ends a command; argparse itself uses 2 for a wrong call.
"""

from __future__ import annotations

from typing import ClassVar


class LamplighterError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        message: One sentence: what happened and where.
        hint: What the user can do about it, or None.
    """

    reason: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def diagnostics(self) -> str:
        """Return the text a person sees: the sentence and, on a second line, what to do."""
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    def to_dict(self) -> dict[str, str | None]:
        """Return the machine-readable form used with ``--json`` and in ``reported`` messages."""
        return {"reason": self.reason, "message": self.message, "hint": self.hint}


class ConfigError(LamplighterError):
    """The person who wrote the configuration or the command line must correct it."""

    reason = "config"
    exit_code = 3


class PackageError(LamplighterError):
    """A package or its metadata cannot be trusted or used; whoever published it must act."""

    reason = "package"
    exit_code = 4


class ManifestError(PackageError):
    """A manifest is not well-formed, or breaks a rule of the package format."""

    reason = "manifest_invalid"


class GraphError(PackageError):
    """A graph file is damaged, or asks for something that no package may ask for."""

    reason = "graph_invalid"


class MissingFileError(PackageError):
    """A file that the manifest lists is not in the package or the repository."""

    reason = "file_missing"


class HashMismatchError(PackageError):
    """A file's length or sha256 is not what the signed manifest says."""

    reason = "hash_mismatch"


class SignatureError(PackageError):
    """Metadata is unsigned, signed by too few trusted keys, or signed by unknown ones."""

    reason = "signature_invalid"


class MetadataError(PackageError):
    """Metadata of the repository is not well-formed, incomplete, or contradicts itself."""

    reason = "metadata_invalid"


class ExpiredMetadataError(PackageError):
    """Signed metadata is past its expiry date: withheld updates, or a wrong clock."""

    reason = "metadata_expired"


class RollbackError(PackageError):
    """Metadata or a package is older than what this device has already trusted."""

    reason = "downgrade_refused"


class IncompatiblePackageError(PackageError):
    """A valid package that this device cannot run (provider, runtime, memory, format version)."""

    reason = "incompatible"


class UnknownPackageError(PackageError):
    """No package of that name and version is signed in the repository or installed in the store."""

    reason = "package_unknown"


class TrialFailedError(PackageError):
    """A package started but failed its self-test or a threshold, so it was not activated.

    Args:
        message: What it did and what was asked for.
        hint: What to do, or None.
        detail: Stable code of what failed, or None.
    """

    reason = "trial_failed"

    def __init__(self, message: str, *, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.detail = detail


class ProbationFailedError(PackageError):
    """A package that was in use crashed, hung or took the device down within its probation."""

    reason = "probation_failed"


class UnstableError(PackageError):
    """The agent did not stay up with a package that had served before; the one before it runs instead."""

    reason = "agent_unstable"


class DownloadError(LamplighterError):
    """Transport failed; the same request may succeed later."""

    reason = "download"
    exit_code = 5


class HttpError(DownloadError):
    """The server answered with a status that is not success.

    Args:
        message: What was requested.
        status: The HTTP status code.
        hint: What to do, or None.
    """

    reason = "http_status"

    def __init__(self, message: str, *, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class TruncatedDownloadError(DownloadError):
    """The transfer ended before the expected length."""

    reason = "download_truncated"


class TooLongError(DownloadError):
    """The server sent, or announced, more bytes than the signed length."""

    reason = "download_too_long"


class SlowDownloadError(DownloadError):
    """The transfer stayed below the lowest accepted rate."""

    reason = "download_slow"


class UpdateCancelledError(LamplighterError):
    """The fleet or the user cancelled an update; what was downloaded stays for the next time."""

    reason = "cancelled"
    exit_code = 11


class UpdateDeadlineError(LamplighterError):
    """A state of an update took longer than it may; what was downloaded stays for the next time."""

    reason = "deadline_passed"
    exit_code = 11


class WindowMissedError(UpdateDeadlineError):
    """A package waited for its maintenance window for too long; the fleet must ask for it again."""

    reason = "window_missed"


class UpdateCutOffError(LamplighterError):
    """The same update was cut off by restarts too often to be tried again."""

    reason = "cut_off"
    exit_code = 11


class MemoryShortError(LamplighterError):
    """The system gave no memory for an update's own work; it may succeed later."""

    reason = "memory_short"
    exit_code = 7


class ClockError(LamplighterError):
    """This device's clock is wrong, so that signatures' dates cannot be judged."""

    reason = "clock_wrong"
    exit_code = 4


class StoreError(LamplighterError):
    """The device's own storage refused: full, read-only, or damaged."""

    reason = "store"
    exit_code = 6


class DiskFullError(StoreError):
    """Not enough free space, found before or while writing."""

    reason = "disk_full"


class EngineError(LamplighterError):
    """Generation failed on this machine."""

    reason = "engine"
    exit_code = 7


class MemoryBudgetError(EngineError):
    """The smallest useful memory plan does not fit into the budget."""

    reason = "memory_budget"


class WorkerError(EngineError):
    """The engine's worker process ended, hung or could not be started; a retry may succeed."""

    reason = "worker_lost"


class RequestError(LamplighterError):
    """A request cannot be served; the asker is told. Codes follow HTTP.

    Args:
        message: What is wrong with the request or why it is refused.
        code: 400 bad request, 404 unknown model, 408 expired, 409 duplicate id with another body, 413 too large,
            429 busy, 499 cancelled, 500 engine failure, 503 not ready.
        param: The option at fault, or None.
        retry_after_s: Seconds after which a retry is sensible, or None when it is not.
        hint: What to do, or None.
    """

    reason = "request"
    exit_code = 8

    def __init__(
        self,
        message: str,
        *,
        code: int = 400,
        param: str | None = None,
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class ContextOverflowError(RequestError):
    """The prompt does not fit into the context that the memory plan allows."""

    reason = "context_overflow"


class ServiceError(LamplighterError):
    """The service cannot start or reach what it needs: socket in use, broker away, port taken."""

    reason = "service"
    exit_code = 9


class BuildError(LamplighterError):
    """A package cannot be built from this checkpoint with these options."""

    reason = "build"
    exit_code = 10


class FidelityError(BuildError):
    """A package is further from its reference than the user allows."""

    reason = "fidelity"
    exit_code = 12


class CheckpointError(BuildError):
    """The checkpoint is damaged, incomplete, or of a kind that is refused (pickled weights)."""

    reason = "checkpoint_invalid"


class UnsupportedModelError(BuildError):
    """The architecture, rope type, activation or option is not supported."""

    reason = "model_unsupported"


class WeightMismatchError(BuildError):
    """Checkpoint and graph disagree about the tensors.

    Args:
        message: What disagrees, naming the first tensors.
        missing: Tensors that the graph needs and the checkpoint lacks.
        unused: Tensors of the checkpoint that the graph does not use.
        hint: What to do about it.
    """

    reason = "weights_mismatch"

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unused: tuple[str, ...] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing
        self.unused = unused


class ChatTemplateError(BuildError):
    """The Jinja chat template cannot be compiled to an equal chat format."""

    reason = "chat_template_unsupported"
