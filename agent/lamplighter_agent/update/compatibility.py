"""Whether this device can run a package, decided from the manifest before a byte of weights is fetched."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lamplighter_agent import __version__
from lamplighter_agent.errors import IncompatiblePackageError, MemoryBudgetError
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.package.onnx_scan import KNOWN_DOMAINS

_LEADING_NUMBERS = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}", re.ASCII)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What this device offers.

    Attributes:
        agent_version: Version of the agent.
        onnxruntime_version: Version of the installed onnxruntime.
        execution_providers: Providers in the manifest's words.
        memory_bytes: Most memory that an engine may use, or None to leave the question to the trial.
        architecture: The processor, as ``uname -m`` names it.
        cpu_features: What it has, in the words of ``/proc/cpuinfo``; None if the system does not tell.
        check_memory: Raises ``MemoryBudgetError`` if no memory plan of a package fits this machine.
        operator_domains: Operator domains that the runtime has; others would need a custom-operator library.
    """

    agent_version: str
    onnxruntime_version: str
    execution_providers: tuple[str, ...] = ("cpu",)
    memory_bytes: int | None = None
    architecture: str = "x86_64"
    cpu_features: frozenset[str] | None = None
    check_memory: Callable[[Manifest], object] = lambda manifest: None
    operator_domains: frozenset[str] = KNOWN_DOMAINS


def this_device(
    memory_bytes: int | None = None, check_memory: Callable[[Manifest], object] = lambda manifest: None
) -> DeviceFacts:
    """Return what is installed here, without importing the runtime.

    Args:
        memory_bytes: Most memory that an engine may use, or None to leave the question to the trial.
        check_memory: Raises ``MemoryBudgetError`` if no memory plan of a package fits this machine.

    Raises:
        IncompatiblePackageError: If onnxruntime is not installed.
    """
    try:
        onnxruntime_version = version("onnxruntime")
    except PackageNotFoundError as error:
        raise IncompatiblePackageError("onnxruntime is not installed", hint="pip install onnxruntime") from error
    return DeviceFacts(
        __version__,
        onnxruntime_version,
        memory_bytes=memory_bytes,
        architecture=platform.machine(),
        cpu_features=read_cpu_features(),
        check_memory=check_memory,
    )


def read_cpu_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """Return the processor's features as Linux names them (x86: ``flags``, Arm: ``Features``), or None."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return None


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
    above = target.below_onnxruntime
    if above is not None and _numbers(device.onnxruntime_version) >= _numbers(above):
        raise IncompatiblePackageError(
            f"{who} needs an onnxruntime below {above}, this device has {device.onnxruntime_version}"
        )
    if target.architectures and device.architecture not in target.architectures:
        raise IncompatiblePackageError(
            f"{who} runs on {', '.join(target.architectures)}, this device is {device.architecture}"
        )
    if device.cpu_features is not None and (lacking := sorted(set(target.cpu_features) - device.cpu_features)):
        raise IncompatiblePackageError(f"{who} needs a processor with {', '.join(lacking)}, which this one lacks")
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
    try:
        device.check_memory(manifest)
    except MemoryBudgetError as error:
        raise IncompatiblePackageError(error.message, hint=error.hint) from error


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
