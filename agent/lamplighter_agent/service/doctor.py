"""Looks a box over: each finding says what is so, and when it is not well, what to do about it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.engine.memory import physical_cores, plan_memory, read_machine_memory
from lamplighter_agent.errors import (
    ConfigError,
    IncompatiblePackageError,
    LamplighterError,
    MemoryBudgetError,
    ServiceError,
)
from lamplighter_agent.service import unix_socket
from lamplighter_agent.service.certificates import valid_until
from lamplighter_agent.service.credentials import read_token, secret_path
from lamplighter_agent.service.doctor_broker import examine_broker
from lamplighter_agent.service.findings import Finding, failure, ok, warning
from lamplighter_agent.service.local_client import read_status
from lamplighter_agent.service.memory_limits import memory_bounds
from lamplighter_agent.service.memory_view import engine_options, plan_text
from lamplighter_agent.update.compatibility import check_compatible, this_device
from lamplighter_agent.update.downloader import HttpSource
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trust import read_root

_MIB: Final = 1024 * 1024
_EXPIRES_SOON: Final = timedelta(days=30)
_FAST_FLAGS: Final = {
    "x86_64": (("avx2",), ("avx512_vnni", "avx_vnni", "amx_int8")),
    "aarch64": (("asimd",), ("asimddp", "i8mm")),
}
_MEND: Final = "mend what the message names, then run doctor again"
_ANOTHER: Final = "push a package that is built for this device: lamplighter-fleet push NAME/VERSION --device …"
_SET_CLOCK: Final = (
    "set the clock (timedatectl set-time) and let a time service keep it: until then every certificate and signature "
    "looks as if it came from the future"
)
_NOT_YOURS: Final = (
    "run doctor as the agent's user, give that user the folder, or set local_api.socket to another place"
)
_EARLIEST_CLOCK: Final = datetime(2026, 1, 1, tzinfo=UTC)


class Doctor:
    """The checks of one box.

    Args:
        config: The whole configuration.
        root: Where ``proc`` and ``sys`` are mounted; a test gives a directory of its own.
        now: Tells the time.
    """

    def __init__(
        self,
        config: AgentConfig,
        root: Path = Path("/"),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._root = root
        self._now = now

    def examine(self, *names: str) -> Iterator[Finding]:
        """Yield findings as they come, each check on its own: one that fails does not end the others.

        Args:
            names: The checks to make; without one, all.
        """
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            "cpu": self._cpu,
            "runtime": self._runtime,
            "disk": self._disk,
            "package": self._package,
            "clock": self._clock,
            "permissions": self._permissions,
            "certificates": self._certificates,
            "repository": self._repository,
            "broker": self._broker,
            "local api": self._local_api,
            "agent": self._agent,
        }
        for name, check in checks.items():
            if names and name not in names:
                continue
            try:
                yield from check()
            except LamplighterError as error:
                yield Finding(check=name, level="error", message=error.message, advice=error.hint or _MEND)
            except PermissionError as error:
                yield failure(name, f"cannot be looked at: {error}", "run it as root")
            except OSError as error:
                yield failure(name, f"cannot be looked at: {error}", _MEND)

    def _cpu(self) -> Iterator[Finding]:
        machine = platform.machine()
        needed, fast = _FAST_FLAGS.get(machine, ((), ()))
        flags = _cpu_flags(self._root)
        cores = physical_cores()
        if machine not in _FAST_FLAGS:
            yield failure("cpu", f"{machine} is not supported", "use a machine with x86-64 or arm64")
        elif flags and not set(needed) <= flags:
            yield warning("cpu", f"{machine} without {', '.join(needed)}", "expect a few tokens a second only")
        elif flags and not set(fast) & flags:
            message = f"{machine}, {cores} cores, no instructions for 8-bit products ({', '.join(fast)})"
            yield ok("cpu", f"{message}: works, newer processors read prompts faster")
        else:
            yield ok("cpu", f"{machine}, {cores} cores, {', '.join(sorted(set(fast) & flags)) or 'flags unknown'}")
        wanted = self._config.engine.threads
        if wanted is not None and wanted > cores:
            yield warning("cpu", f"engine.threads is {wanted}, but there are {cores} cores", "leave it out")

    def _runtime(self) -> Iterator[Finding]:
        code = "import lamplighter_agent, onnxruntime, tokenizers; print(onnxruntime.__version__)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        if result.returncode == 0:
            yield ok("runtime", f"onnxruntime {result.stdout.strip()}, Python {platform.python_version()}")
            return
        reason = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        advice = "install the agent anew (scripts/install)"
        if "xecutable stack" in reason:
            advice = "this build of onnxruntime needs MemoryDenyWriteExecute=no in a drop-in of the unit"
        yield failure("runtime", f"the inference runtime cannot be loaded: {reason}", advice)

    def _disk(self) -> Iterator[Finding]:
        path = self._config.state_dir
        while not path.exists():
            path = path.parent
        disk = os.statvfs(path)
        free = disk.f_bavail * disk.f_frsize
        reserve = self._config.repository.disk_reserve_bytes
        text = f"{free // _MIB} MiB free in {path}"
        if disk.f_flag & os.ST_RDONLY:
            yield failure("disk", f"{path} is read-only", "mount it for writing")
        elif free < reserve:
            yield failure("disk", f"{text}; {reserve // _MIB} MiB stay reserved", "free some, or add a disk")
        elif free < reserve + 512 * _MIB:
            yield warning("disk", f"{text}: a package may not fit", "free some before the next update")
        else:
            yield ok("disk", text)
        if _file_system(path, self._root) in {"tmpfs", "ramfs"}:
            yield warning("disk", f"{path} lies in memory", "set state_dir to a disk: packages are lost at a restart")

    def _package(self) -> Iterator[Finding]:
        machine = read_machine_memory(self._root)
        limit = "no limit" if machine.limit_bytes is None else f"limit {machine.limit_bytes // _MIB} MiB"
        memory = f"{machine.available_bytes // _MIB} MiB available, {limit}"
        if not self._config.state_dir.exists():
            yield ok("package", f"none yet; {memory}")
            return
        current = Store(self._config.state_dir, reserve_bytes=0).current()
        if current is None:
            yield warning("package", f"none is in use; {memory}", "lamplighter-fleet push NAME/VERSION --device …")
            return
        Store(self._config.state_dir, reserve_bytes=0).verify(current)
        yield ok("package", f"{current.reference}: every file is as its manifest says")
        try:
            check_compatible(current.manifest, this_device())
        except IncompatiblePackageError as error:
            yield failure("package", error.message, error.hint or _ANOTHER)
            return
        options = engine_options(self._config.engine)
        if (worker := self._worker_rss()) is not None:  # what the running engine holds is there for the plan
            machine = msgspec.structs.replace(machine, available_bytes=machine.available_bytes + worker)
        try:
            plan = plan_memory(current.manifest, machine, options)
        except MemoryBudgetError as error:
            yield failure("memory", error.message, error.hint or _ANOTHER)
            return
        message = f"{memory}; the plan: {plan_text(plan)}"
        if worker is not None:
            message += f"; the engine holds {worker // _MIB} MiB now"
        needed = memory_bounds(plan).max_bytes
        yield ok("memory", f"{message}; the unit needs {needed // _MIB} MiB, which it is given while it serves")

    def _worker_rss(self) -> int | None:
        socket = self._config.local_api.socket
        if socket is None or not socket.exists():
            return None
        with contextlib.suppress(ServiceError):
            return read_status(socket).worker_rss_bytes
        return None

    def _clock(self) -> Iterator[Finding]:
        now = self._now()
        if now < _EARLIEST_CLOCK:
            yield failure("clock", f"it is {now:%Y-%m-%d} here", _SET_CLOCK)
            return
        marks = ("run/systemd/timesync/synchronized", "run/chrony/chronyd.pid", "run/chronyd.pid", "run/ntpd.pid")
        if any((self._root / mark).exists() for mark in marks):
            yield ok("clock", f"{now:%Y-%m-%d %H:%M} UTC, kept by a time service")
        else:
            advice = "install systemd-timesyncd or chrony: a wrong clock makes signatures look expired"
            yield warning("clock", f"{now:%Y-%m-%d %H:%M} UTC, and no time service seems to keep it", advice)

    def _permissions(self) -> Iterator[Finding]:
        mqtt, api = self._config.mqtt, self._config.local_api
        secrets = [mqtt.password_file, mqtt.tls.key_file if mqtt.tls else None, api.token_file]
        for secret in filter(None, secrets):
            path = secret_path(secret)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                yield failure("permissions", f"others may read {path} (mode {mode:04o})", f"chmod 600 {path}")
            else:
                yield ok("permissions", f"{path} is its owner's alone")
        if api.socket is not None and api.socket.is_socket() and api.socket.stat().st_mode & 0o007:
            yield warning("permissions", f"everybody may use {api.socket}", "set local_api.mode to 0660 and a group")

    def _certificates(self) -> Iterator[Finding]:
        tls = self._config.mqtt.tls
        files = [tls.ca_file, tls.cert_file] if tls else []
        for path in [*files, self._config.repository.ca_file]:
            if path is not None:
                yield _certificate(secret_path(path), self._now())

    def _repository(self) -> Iterator[Finding]:
        repository = self._config.repository
        if repository.url is None:
            yield warning("repository", "repository.url is not set", "without it packages come from USB sticks only")
            return
        if repository.root_file is None:
            raise ConfigError("repository.root_file is not set", hint="put the operator's root.json onto the box")
        read_root(repository.root_file)
        source = HttpSource(
            repository.url, timeout_s=repository.connect_timeout_s, ca_file=repository.ca_file, proxy=repository.proxy
        )
        begun = time.monotonic()
        with source.open("metadata/timestamp.json") as stream:
            next(stream.blocks, b"")
        yield ok("repository", f"{repository.url} answers in {time.monotonic() - begun:.2f} s")

    def _broker(self) -> Iterator[Finding]:
        yield from examine_broker(self._config)

    def _local_api(self) -> Iterator[Finding]:
        api = self._config.local_api
        if api.tcp_port is not None:
            read_token(api)
            yield ok("local api", f"the loopback's port {api.tcp_port} asks for the token of {api.token_file}")
        if api.socket is None:
            return
        unix_socket.check(api.socket, api.group)
        if api.socket.is_socket():
            yield ok("local api", f"{api.socket} is there")
            return
        folder = api.socket.parent
        while not folder.exists():
            folder = folder.parent
        if api.socket.exists():
            yield failure("local api", f"{api.socket} is there and is no socket", "remove it, or set local_api.socket")
        elif not os.access(folder, os.W_OK | os.X_OK):
            who = f"user {os.geteuid()} may not write {folder}"
            yield failure("local api", f"{api.socket} cannot be made: {who}", _NOT_YOURS)
        else:
            yield ok("local api", f"{api.socket} can be made")

    def _agent(self) -> Iterator[Finding]:
        socket = self._config.local_api.socket
        if socket is None or (socket.exists() and not socket.is_socket()):
            return
        try:
            sample = read_status(socket)
        except ServiceError as error:
            yield warning("agent", error.message, error.hint or _MEND)
            return
        text = f"it runs, engine {sample.worker}, {sample.requests_total} requests, {sample.worker_restarts} restarts"
        if sample.worker in {"failed", "safe_mode"}:
            yield failure("agent", text, "journalctl -u lamplighter-agent says why")
        elif sample.throttled:
            yield warning("agent", f"{text}; the CPU is slowed down for heat or power", "cool the box")
        else:
            yield ok("agent", text)


def _certificate(path: Path, now: datetime) -> Finding:
    until = valid_until(path)
    if until < now:
        return failure("certificates", f"{path} expired on {until:%Y-%m-%d}", "replace it and restart the agent")
    text = f"{path} is valid until {until:%Y-%m-%d}"
    if until - now < _EXPIRES_SOON:
        return warning("certificates", f"{text}, {(until - now).days} days from now", "renew it")
    return ok("certificates", text)


def _cpu_flags(root: Path) -> set[str]:
    text = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _file_system(path: Path, root: Path) -> str:
    """Return the type of the file system that holds a path."""
    best, kind = Path("/"), ""
    for line in (root / "proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        place = Path(fields[1].replace("\\040", " "))
        if path.is_relative_to(place) and place.is_relative_to(best):
            best, kind = place, fields[2]
    return kind
