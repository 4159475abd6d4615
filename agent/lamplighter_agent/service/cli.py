"""The service's commands: run it, ask it, and work on its store beside it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import yaml

from lamplighter_agent.arguments import MIB, Commands, add_command
from lamplighter_agent.config import AgentConfig
from lamplighter_agent.config_file import load_config
from lamplighter_agent.engine.cli import add_engine_arguments, engine_options, prepared_root
from lamplighter_agent.errors import ConfigError, RequestError, ServiceError
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.service.local_client import read_status
from lamplighter_agent.service.status_view import status_lines
from lamplighter_agent.text import printable
from lamplighter_agent.update.states import PackageRef, UpdateReport

if TYPE_CHECKING:
    from lamplighter_agent.update.interrupt import Interrupt
    from lamplighter_agent.update.updater import Updater

_WATCH_S = 2.0


def add_commands(commands: Commands) -> None:
    """Add ``run``, ``serve``, ``pull``, ``status``, ``doctor``, ``config``, ``audit`` and ``rollback``."""
    run = add_command(commands, "run", run_agent, "run as a service: MQTT, local API, updates, telemetry")
    _add_config(run)
    serve = add_command(
        commands, "serve", serve_package, "serve one package over the OpenAI API on a Unix socket, nothing else"
    )
    serve.add_argument("package", type=Path, help="package directory")
    serve.add_argument("--socket", type=Path, required=True, help="path of the Unix socket")
    add_engine_arguments(serve)
    pull = add_command(commands, "pull", pull_package, "fetch a signed package into the store without running it")
    pull.add_argument("reference", nargs="?", help="NAME/VERSION; without it the signed packages are listed")
    pull.add_argument("--from", dest="source", type=Path, help="read the repository from this directory (a USB stick)")
    _add_config(pull)
    status = add_command(commands, "status", show_status, "ask the running agent how it is")
    status.add_argument("--watch", action="store_true", help="show it again every two seconds until Ctrl-C")
    status.add_argument("--socket", type=Path, help="the agent's socket (default: from the configuration)")
    _add_config(status)
    doctor = add_command(commands, "doctor", examine, "look this box over and say what to do about each finding")
    _add_config(doctor)
    config = add_command(commands, "config", show_config, "check a configuration and show all that is set by it")
    _add_config(config)
    audit = add_command(commands, "audit", show_audit, "show who asked this device for what, and what happened")
    audit.add_argument("--last", type=int, default=0, metavar="N", help="the last N entries (default: all)")
    _add_config(audit)
    rollback = add_command(commands, "rollback", roll_back, "switch back to the previous package")
    _add_config(rollback)


def show_audit(arguments: argparse.Namespace) -> int:
    """Print the audit log: who asked for what, and what happened.

    Raises:
        LamplighterError: If it cannot be read.
    """
    from lamplighter_agent.update.audit import AUDIT_NAME, AuditLog

    entries = AuditLog(_config(arguments).state_dir / AUDIT_NAME).read()
    for entry in entries[-arguments.last :] if arguments.last else entries:
        if arguments.json:
            print(msgspec.json.encode(entry).decode())
            continue
        who = f" by {entry.requested_by}" if entry.requested_by else ""
        why = f"  {entry.reason}: {entry.message}" if entry.reason else f"  {entry.message or ''}".rstrip()
        what = f"{entry.event:20} {entry.package or entry.active or '-'}{who}{why}"
        print(f"{entry.time:%Y-%m-%d %H:%M:%S}  {printable(what)}")  # others wrote some of it
    return 0


def run_agent(arguments: argparse.Namespace) -> int:
    """Run the service until a signal ends it.

    Raises:
        LamplighterError: If it cannot start.
    """
    from lamplighter_agent.service.app import run

    config = _config(arguments)
    logging.getLogger().setLevel(config.log.numeric_level)
    return run(config)


def serve_package(arguments: argparse.Namespace) -> int:
    """Serve one package over HTTP on a Unix socket.

    Raises:
        LamplighterError: If the package cannot be loaded or the socket is in use.
    """
    from lamplighter_agent.service.serve import serve

    logging.getLogger().setLevel(logging.INFO)
    return serve(arguments.package, arguments.socket, engine_options(arguments), prepared_root=prepared_root(arguments))


def pull_package(arguments: argparse.Namespace) -> int:
    """Fetch and verify a package into the store, or list what the repository signs.

    Raises:
        LamplighterError: If it cannot be trusted, fetched or stored.
    """
    updater = _updater(_config(arguments), arguments.source)
    if arguments.reference is None:
        packages = [str(reference) for reference in updater.packages()]
        print(json.dumps({"packages": packages}) if arguments.json else "\n".join(packages))
        return 0
    installed = updater.pull(PackageRef.parse(arguments.reference))
    if arguments.json:
        print(json.dumps({"package": str(installed.reference), "path": str(installed.path)}))
    else:
        print(f"\n{installed.reference} is in {installed.path}, verified; it is tried and used when it is pushed")
    return 0


def show_status(arguments: argparse.Namespace) -> int:
    """Show how the running agent is.

    Raises:
        ServiceError: If no agent answers.
        ConfigError: If neither an argument nor the configuration names a socket.
    """
    socket = arguments.socket or _config(arguments).local_api.socket
    if socket is None:
        raise ConfigError("local_api.socket is switched off", hint="name the socket with --socket")
    while True:
        sample = read_status(socket)
        lines = [msgspec.json.encode(sample).decode()] if arguments.json else list(status_lines(sample))
        clear = "\x1b[H\x1b[2J" if arguments.watch and not arguments.json and sys.stdout.isatty() else ""
        print(clear + "\n".join(lines), flush=True)
        if not arguments.watch:
            return 0
        time.sleep(_WATCH_S)


def examine(arguments: argparse.Namespace) -> int:
    """Look this box over and say what to do about each finding; fails if something does not work.

    Raises:
        ConfigError: If the configuration is not in order.
    """
    from lamplighter_agent.service.doctor import Doctor

    config = _config(arguments)
    findings = []
    logging.getLogger().setLevel(logging.CRITICAL)  # the findings say it
    for finding in Doctor(config).examine():
        findings.append(finding)
        if not arguments.json:
            print(f"{finding.level:8} {finding.check:13} {finding.message}", flush=True)
            if finding.advice:
                print(f"{'':22} -> {finding.advice}", flush=True)
    if arguments.json:
        print(msgspec.json.encode(findings).decode())
    return ServiceError.exit_code if any(finding.level == "error" for finding in findings) else 0


def show_config(arguments: argparse.Namespace) -> int:
    """Read a configuration as ``run`` would and print every setting with its value.

    Raises:
        ConfigError: If it is not in order.
    """
    values = msgspec.to_builtins(_config(arguments), enc_hook=str)
    if arguments.json:
        print(json.dumps(values))
    else:
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0


def roll_back(arguments: argparse.Namespace) -> int:
    """Switch the store back to the previous package; a running agent is told over MQTT instead.

    Raises:
        LamplighterError: If there is no previous package or it is damaged.
        RequestError: If an agent is running: it would not notice.
    """
    config = _config(arguments)
    socket = config.local_api.socket
    if socket is not None and socket.exists():
        with contextlib.suppress(ServiceError):  # a socket that a dead agent left
            read_status(socket)
            raise RequestError(
                f"an agent is running on {socket} and would not notice",
                code=409,
                hint="stop it first, or send it the command 'rollback' over MQTT",
            )
    outcome = _updater(config, None).rollback()
    print(msgspec.json.encode(outcome.report).decode() if arguments.json else outcome.report.message)
    return 0


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, help="configuration file (default: built-in defaults)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. mqtt.host=broker"
    )


def _config(arguments: argparse.Namespace) -> AgentConfig:
    return load_config(arguments.config, arguments.set)


def _updater(config: AgentConfig, source: Path | None) -> Updater:
    """Return an updater that works beside no service: it tries and switches nothing, and prints its progress."""
    from lamplighter_agent.service.update_setup import make_updater
    from lamplighter_agent.update.hooks import UpdateHooks
    from lamplighter_agent.update.sources import DirectorySource
    from lamplighter_agent.update.store import Store

    def no_trial(package: Path, manifest: Manifest, _: Interrupt) -> NoReturn:
        raise ServiceError(f"{manifest.reference} in {package} can only be tried by a running agent")

    hooks = UpdateHooks(
        prepare=lambda package, manifest, _: None,
        trial=no_trial,
        activate=lambda reference, _: None,
        report=_show_report,
    )
    store = Store(config.state_dir, reserve_bytes=config.repository.disk_reserve_bytes)
    return make_updater(config, store, hooks, source=None if source is None else DirectorySource(source))


def _show_report(report: UpdateReport) -> None:
    line = f"{report.package}/{report.version}: {report.state.value}"
    if report.bytes_total:
        line += f" {report.progress:4.0%} of {report.bytes_total / MIB:.1f} MiB"
    begin, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
    print(f"{begin}{line}", file=sys.stderr, end=end, flush=True)
