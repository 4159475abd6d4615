"""The command line: one function a subcommand, and one place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO, get_args

import msgspec

import lamplighter_fleet.publishing_cli
from lamplighter_agent import __version__
from lamplighter_agent.errors import ConfigError, LamplighterError, PackageError, ServiceError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.messages import (
    CommandMessage,
    CommandName,
    DeltaReply,
    LogLevel,
    PromptMessage,
    ReportedMessage,
)
from lamplighter_agent.update.states import PackageRef, UpdatePolicy, UpdateState
from lamplighter_fleet.arguments import add_command, first_line
from lamplighter_fleet.broker import Broker, BrokerOptions, connect
from lamplighter_fleet.commands import run_command, send_command
from lamplighter_fleet.devices import FleetView, find_devices, list_devices
from lamplighter_fleet.prompt import ask_device, ask_group
from lamplighter_fleet.push import push_all, silence
from lamplighter_fleet.terminal import Board, change_line, clock, device_table, outcome_line, report_line, summary
from lamplighter_fleet.untrusted import plain, prose, safe_json
from lamplighter_fleet.watch import follow

_MIB = 1024 * 1024
_INTERRUPTED = 130
_REDRAW_S: Final = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except LamplighterError as error:
        if arguments.json:
            print(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        print(f"lamplighter-fleet: {error.diagnostics()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more; keep the interpreter from complaining at exit
        return 1
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="lamplighter-fleet", description="Operate a fleet of Lamplighter agents.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lamplighter_fleet.publishing_cli.add_commands(commands)
    push_command = add_command(
        commands, "push", push_package, "make a package the desired one of devices, and follow the outcome"
    )
    push_command.add_argument("reference", help="NAME/VERSION as published")
    _add_target(push_command)
    push_command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after (default: 600)")
    push_command.add_argument("--retry-failed", action="store_true", help="try again a version that failed there")
    _add_policy(push_command)
    _add_broker(push_command)
    for name, function, text in (
        ("rollback", roll_back, "switch a device back to its previous package"),
        ("cancel", cancel_update, "end the update that is at work on a device"),
    ):
        command = add_command(commands, name, function, text)
        command.add_argument("--device", required=True, help="the device's id")
        command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="give up after (default: 120)")
        _add_broker(command)
    prompt = add_command(commands, "prompt", ask, "ask a device, or one of a group, and print the answer as it streams")
    prompt.add_argument("text", help="the prompt; '-' reads it from standard input")
    target = prompt.add_mutually_exclusive_group(required=True)
    target.add_argument("--device", help="the device's id")
    target.add_argument("--group", help="any one device of this group")
    prompt.add_argument("--system", help="system message")
    prompt.add_argument("--max-tokens", type=int, help="most tokens to generate")
    prompt.add_argument("--temperature", type=float, help="0 picks the most likely token")
    prompt.add_argument("--seed", type=int, help="same seed, same text")
    prompt.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence (default: 120)")
    _add_broker(prompt)
    devices = add_command(commands, "devices", show_devices, "list the devices and how they are")
    devices.add_argument("--watch", action="store_true", help="keep the list up to date until Ctrl-C")
    _add_broker(devices)
    watch = add_command(commands, "watch", watch_fleet, "follow updates and events until Ctrl-C")
    watch.add_argument("--device", help="this device only")
    watch.add_argument("--seconds", type=float, metavar="S", help="end after this long")
    _add_broker(watch)
    command = add_command(commands, "command", run_on_devices, "tell devices to do something once")
    command.add_argument("name", choices=get_args(CommandName), metavar="NAME", help=", ".join(get_args(CommandName)))
    command.add_argument("--level", choices=get_args(LogLevel), help="for set_log_level")
    command.add_argument("--timeout", type=float, default=60.0, metavar="S", help="longest wait (default: 60)")
    _add_target(command)
    _add_broker(command)
    return parser


def _add_target(command: argparse.ArgumentParser) -> None:
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--device", help="the device's id")
    target.add_argument("--group", help="every device of this group")
    target.add_argument("--all", action="store_true", help="every device that the broker knows")


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--window", metavar="HH:MM-HH:MM", help="fetch it now, use it within this local time")
    command.add_argument("--urgent", action="store_true", help="wait for no window, not even the device's own")
    limits = command.add_argument_group("limits of the trial", "what the device must measure before it goes on")
    limits.add_argument("--min-tokens-per-s", type=float, metavar="N", help="lowest decode speed")
    limits.add_argument("--max-first-token-s", type=float, metavar="S", help="longest time to the first token")
    limits.add_argument("--max-load-s", type=float, metavar="S", help="longest time to load")
    limits.add_argument("--max-memory-mb", type=int, metavar="MB", help="most memory of the engine")


def _add_broker(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="127.0.0.1", help="the broker (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=1883, help="its port (default: 1883)")
    command.add_argument("--prefix", default="lamplighter/v1", help="first levels of the topics")
    command.add_argument("--username", help="user name at the broker")
    command.add_argument("--password-file", type=Path, help="file whose first line is the password")
    command.add_argument("--ca-file", type=Path, help="authority of the broker's certificate; switches TLS on")
    command.add_argument("--cert-file", type=Path, help="certificate of this tool")
    command.add_argument("--key-file", type=Path, help="its private key")


def push_package(arguments: argparse.Namespace) -> int:
    """Push a package to devices and wait for the outcome; fails if it did not become active on each.

    Raises:
        LamplighterError: If the broker does not answer or knows no such device.
    """
    reference, policy = PackageRef.parse(arguments.reference), _policy(arguments)
    progress = _Progress(sys.stderr if arguments.json else sys.stdout)
    with connect(_broker(arguments)) as broker:
        outcomes = push_all(
            broker,
            _targets(broker, arguments),
            reference,
            policy=policy,
            requested_by=getpass.getuser(),
            timeout_s=arguments.timeout,
            progress=progress.show,
        )
    if arguments.device is not None and not outcomes[0].ended:
        raise ServiceError(silence(outcomes[0], arguments.timeout), hint="the wish stays: the device may follow it")
    if arguments.json:  # one device: its report; several: a list of devices with their reports
        _print_json(outcomes if arguments.device is None else outcomes[0].report)
    active = [outcome for outcome in outcomes if outcome.report and outcome.report.state is UpdateState.ACTIVE]
    if not arguments.json and (len(outcomes) > 1 or not active):
        for outcome in outcomes:
            print(outcome_line(outcome))
        print(f"active on {len(active)} of {len(outcomes)}")
    if len(active) == len(outcomes):
        return 0
    silent = [outcome for outcome in outcomes if not outcome.ended]
    for outcome in silent:
        print(f"{silence(outcome, arguments.timeout)}; the wish stays", file=sys.stderr)
    return ServiceError.exit_code if len(silent) == len(outcomes) - len(active) else PackageError.exit_code


def _targets(broker: Broker, arguments: argparse.Namespace) -> list[str]:
    if arguments.device is not None:
        return [arguments.device]
    return find_devices(broker, group=arguments.group)


def roll_back(arguments: argparse.Namespace) -> int:
    """Roll a device back and print what it says.

    Raises:
        LamplighterError: If it refuses or does not answer.
    """
    return _command(arguments, "rollback")


def cancel_update(arguments: argparse.Namespace) -> int:
    """Cancel a device's update and print what it says.

    Raises:
        LamplighterError: If there is none, or it does not answer.
    """
    return _command(arguments, "cancel_update")


def _command(arguments: argparse.Namespace, command: CommandName) -> int:
    with connect(_broker(arguments)) as broker:
        message = send_command(broker, arguments.device, command, timeout_s=arguments.timeout)
    if arguments.json:
        _print_json({"message": message})
    else:
        print(f"{arguments.device}: {plain(message)}")
    return 0


def _policy(arguments: argparse.Namespace) -> UpdatePolicy:
    memory_mb = arguments.max_memory_mb
    limits = {
        "min_generated_tokens_per_s": arguments.min_tokens_per_s,
        "max_first_token_s": arguments.max_first_token_s,
        "max_load_s": arguments.max_load_s,
        "max_peak_rss_bytes": None if memory_mb is None else memory_mb * _MIB,
    }
    values = {"retry_failed": arguments.retry_failed, "window": arguments.window, "urgent": arguments.urgent}
    try:
        return msgspec.convert({**values, "limits": limits}, UpdatePolicy)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the policy is not valid: {error}") from error


def ask(arguments: argparse.Namespace) -> int:
    """Ask over MQTT and print the answer.

    Raises:
        LamplighterError: If the prompt is refused or no answer comes.
    """
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    head = () if arguments.system is None else (ChatMessage("system", arguments.system),)
    question = PromptMessage(
        messages=(*head, ChatMessage("user", text)),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    with connect(_broker(arguments)) as broker:
        if arguments.device is not None:
            replies = ask_device(broker, arguments.device, question, silence_s=arguments.timeout)
        else:
            replies = ask_group(broker, arguments.group, question, silence_s=arguments.timeout)
        for reply in replies:
            if isinstance(reply, DeltaReply):
                if not arguments.json:
                    print(prose(reply.text), end="", flush=True)
            elif arguments.json:
                _print_json(reply)
            else:
                print()
                print(summary(reply), file=sys.stderr)
    return 0


def show_devices(arguments: argparse.Namespace) -> int:
    """List the devices that the broker knows.

    Raises:
        LamplighterError: If the broker does not answer.
    """
    with connect(_broker(arguments)) as broker:
        devices = list_devices(broker)
        if arguments.json:
            _print_json(devices)
            return 0
        if not arguments.watch:
            print("\n".join(device_table(devices, time.time())))
            return 0
        view = FleetView(broker.prefix, {device.id: device for device in devices})
        board, drawn_s = Board(), 0.0
        for _ in follow(broker, view):
            if time.monotonic() - drawn_s >= _REDRAW_S:
                drawn_s = time.monotonic()
                table = device_table(sorted(view.devices.values(), key=lambda each: each.id), time.time())
                print(board.draw([], table) if sys.stdout.isatty() else "\n".join(table), end="", flush=True)
    return 0


def watch_fleet(arguments: argparse.Namespace) -> int:
    """Print what devices tell; on a terminal updates at work stand below, with bars.

    Raises:
        LamplighterError: If the broker does not answer.
    """
    progress = _Progress(sys.stdout)
    with connect(_broker(arguments)) as broker:
        view = FleetView(broker.prefix)
        for change in follow(broker, view, device_id=arguments.device, for_s=arguments.seconds):
            if change is None:
                continue
            if arguments.json:
                told = {"device": change.device.id, "kind": change.leaf, "stored": change.stored}
                _print_json({**told, change.leaf: change.content})
            elif change.leaf == "reported" and change.device.reported is not None:
                progress.show(change.device.id, change.device.reported)
            elif (line := change_line(change)) is not None:
                progress.say(line)
    return 0


def run_on_devices(arguments: argparse.Namespace) -> int:
    """Send a command to devices and print what each answers; fails if one refuses or is silent.

    Raises:
        LamplighterError: If the broker does not answer, or one device alone was asked and refused.
    """
    command = CommandMessage(command=arguments.name, level=arguments.level)
    failed: LamplighterError | None = None
    with connect(_broker(arguments)) as broker:
        for device_id in _targets(broker, arguments):
            try:
                result = run_command(broker, device_id, command, timeout_s=arguments.timeout)
            except LamplighterError as error:
                failed = error
                print(f"{device_id}: {error.diagnostics()}", file=sys.stderr)
                continue
            if arguments.json:
                _print_json({"device": device_id, "message": result.message, "data": result.data})
            else:
                print(f"{device_id}: {plain(result.message)}")
                if result.data is not None:
                    print(safe_json(json.dumps(result.data, indent=2, ensure_ascii=False)))
    return 0 if failed is None else failed.exit_code


def _print_json(value: object) -> None:
    print(safe_json(msgspec.json.encode(value).decode()), flush=True)


class _Progress:
    """Shows reports of many devices: bars that are redrawn on a terminal, one line a state elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._board = Board()
        self._lines: dict[str, str] = {}
        self._states: dict[str, UpdateState] = {}

    def show(self, device_id: str, report: ReportedMessage) -> None:
        """Show a report."""
        line = f"{device_id:20} {report_line(report)}"
        new = self._states.get(device_id) is not report.state
        self._states[device_id] = report.state
        if not self._stream.isatty():
            if new:
                self.say(line)
        elif report.state.is_final:
            self._lines.pop(device_id, None)
            self.say(line)
        else:
            self._lines[device_id] = line
            self._draw([])

    def say(self, line: str) -> None:
        """Show a line that stays."""
        self._draw([f"{clock()}  {line}"])

    def _draw(self, above: list[str]) -> None:
        board = [self._lines[device_id] for device_id in sorted(self._lines)]
        self._stream.write(self._board.draw(above, board))
        self._stream.flush()


def _broker(arguments: argparse.Namespace) -> BrokerOptions:
    return BrokerOptions(
        host=arguments.host,
        port=arguments.port,
        prefix=arguments.prefix,
        username=arguments.username,
        password=None if arguments.password_file is None else first_line(arguments.password_file),
        ca_file=arguments.ca_file,
        cert_file=arguments.cert_file,
        key_file=arguments.key_file,
    )
