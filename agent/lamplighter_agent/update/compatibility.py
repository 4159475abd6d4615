"""Whether this device can run a package, decided from the manifest before a byte of weights is fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lamplighter_agent import __version__
from lamplighter_agent.errors import IncompatiblePackageError
from lamplighter_agent.package.manifest import Manifest

_LEADING_NUMBERS = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}", re.ASCII)
_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What this device offers.

    Attributes:
        agent_version: Version of the agent.
        onnxruntime_version: Version of the installed onnxruntime.
        execution_providers: Providers in the manifest's words.
        memory_bytes: Most memory that an engine may use, or None to leave the question to the trial.
        operator_domains: Operator domains that the runtime has; others would need a custom-operator library.
    """

    agent_version: str
    onnxruntime_version: str
    execution_providers: tuple[str, ...] = ("cpu",)
    memory_bytes: int | None = None
    operator_domains: frozenset[str] = _KNOWN_DOMAINS


def this_device(memory_bytes: int | None = None) -> DeviceFacts:
    """Return what is installed here, without importing the runtime.

    Args:
        memory_bytes: Most memory that an engine may use, or None to leave the question to the trial.

    Raises:
        IncompatiblePackageError: If onnxruntime is not installed.
    """
    try:
        onnxruntime_version = version("onnxruntime")
    except PackageNotFoundError as error:
        raise IncompatiblePackageError("onnxruntime is not installed", hint="pip install onnxruntime") from error
    return DeviceFacts(__version__, onnxruntime_version, memory_bytes=memory_bytes)


def check_compatible(manifest: Manifest, device: DeviceFacts) -> None:
    """Check that a device can run a package.

    Raises:
        IncompatiblePackageError: Naming what the package needs and what the device has.
    """
    who, target = manifest.reference, manifest.target
    if target.execution_provider not in device.execution_providers:
        raise IncompatiblePackageError(
            f"{who} is built for {target.execution_provider}, this device has {', '.join(device.execution_providers)}",
            hint="build the package with -e for one of these",
        )
    for what, needed, present in (
        ("agent", target.min_agent, device.agent_version),
        ("onnxruntime", target.min_onnxruntime, device.onnxruntime_version),
    ):
        if _numbers(present) < _numbers(needed):
            raise IncompatiblePackageError(f"{who} needs {what} {needed} or later, this device has {present}")
    if unknown := sorted(set(target.operator_domains) - device.operator_domains):
        raise IncompatiblePackageError(
            f"{who} uses the operator domain {unknown[0]!r}", hint="custom operators are never loaded"
        )
    needed_bytes = manifest.memory.weights_bytes + manifest.memory.prefill_scratch_bytes
    if device.memory_bytes is not None and needed_bytes > device.memory_bytes:
        raise IncompatiblePackageError(
            f"{who} needs {needed_bytes} bytes of memory before its first token, {device.memory_bytes} are allowed",
            hint="raise engine.memory_budget_mb if the device has more, or build the package with fewer bits",
        )


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version without trailing zeros, so that 1.31 equals 1.31.0.

    Raises:
        IncompatiblePackageError: If it does not begin with a number.
    """
    match = _LEADING_NUMBERS.match(text)
    if match is None:
        raise IncompatiblePackageError(f"version {text[:40]!r} is not numbers with dots")
    numbers = [int(part) for part in match[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
