"""The command line: one function a subcommand, and one place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

import msgspec

import lamplighter_fleet.publishing_cli
from lamplighter_agent import __version__
from lamplighter_agent.errors import ConfigError, LamplighterError, PackageError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.messages import CommandName, DeltaReply, FinalReply, PromptMessage, ReportedMessage
from lamplighter_agent.update.states import PackageRef, UpdatePolicy, UpdateState
from lamplighter_fleet.arguments import add_command, first_line
from lamplighter_fleet.broker import BrokerOptions, connect
from lamplighter_fleet.commands import send_command
from lamplighter_fleet.devices import Device, list_devices
from lamplighter_fleet.prompt import ask_device, ask_group
from lamplighter_fleet.push import push

_MIB = 1024 * 1024
_INTERRUPTED = 130
_DEVICE_LINE: Final = "{:20} {:8} {:40} {:12} {:>9} {:>12} {:>12}"


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
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="lamplighter-fleet", description="Operate a fleet of Lamplighter agents.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lamplighter_fleet.publishing_cli.add_commands(commands)
    push_command = add_command(
        commands, "push", push_package, "make a package the desired one of a device, follow the outcome"
    )
    push_command.add_argument("reference", help="NAME/VERSION as published")
    push_command.add_argument("--device", required=True, help="the device's id")
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
    _add_broker(devices)
    return parser


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
    """Push a package to a device and wait for the outcome; fails if it did not become active.

    Raises:
        LamplighterError: If the broker or the device does not answer.
    """
    shown = _ReportLines(sys.stderr if arguments.json else sys.stdout)
    with connect(_broker(arguments)) as broker:
        report = push(
            broker,
            arguments.device,
            PackageRef.parse(arguments.reference),
            policy=_policy(arguments),
            requested_by=getpass.getuser(),
            timeout_s=arguments.timeout,
            progress=shown.show,
        )
    if arguments.json:
        print(msgspec.json.encode(report).decode())
    if report.state is UpdateState.ACTIVE:
        return 0
    if not arguments.json:
        print(f"{arguments.device}: {report.reason}: {report.message}", file=sys.stderr)
        if report.hint:
            print(f"  {report.hint}", file=sys.stderr)
    return PackageError.exit_code


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
    print(json.dumps({"message": message}) if arguments.json else f"{arguments.device}: {message}")
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
                    print(reply.text, end="", flush=True)
            elif arguments.json:
                print(msgspec.json.encode(reply).decode())
            else:
                print()
                print(_summary(reply), file=sys.stderr)
    return 0


def show_devices(arguments: argparse.Namespace) -> int:
    """List the devices that the broker knows.

    Raises:
        LamplighterError: If the broker does not answer.
    """
    with connect(_broker(arguments)) as broker:
        devices = list_devices(broker)
    if arguments.json:
        print(msgspec.json.encode(devices).decode())
        return 0
    print(_DEVICE_LINE.format("DEVICE", "STATE", "PACKAGE", "UPDATE", "TOKENS/S", "FIRST TOKEN", "PEAK MEMORY"))
    for device in devices:
        print(_DEVICE_LINE.format(*_device_cells(device)))
    return 0


class _ReportLines:
    """Shows an update's reports: one line a state, download progress within its line on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._state: UpdateState | None = None

    def show(self, report: ReportedMessage) -> None:
        """Show a report."""
        redraw = self._stream.isatty() and report.state is self._state
        if report.state is self._state and not redraw and not report.bytes_total:
            return
        line = f"{report.duration_s:7.2f} s  {report.state.value}"
        if report.state is UpdateState.DOWNLOADING and report.bytes_total:
            line += f" {report.bytes_done / _MIB:.1f} of {report.bytes_total / _MIB:.1f} MiB"
        if redraw:
            self._stream.write(f"\x1b[1A\r{line}\x1b[K\n")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
        self._state = report.state


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


def _summary(reply: FinalReply) -> str:
    usage, timings = reply.usage, reply.timings
    return (
        f"[{reply.model} on {reply.device}: {usage.prompt_tokens} + {usage.generated_tokens} tokens, first after "
        f"{timings.first_token_s:.3f} s, {timings.generated_tokens_per_s:.1f} tokens/s, {reply.finish_reason}]"
    )


def _device_cells(device: Device) -> tuple[str, ...]:
    sample = device.telemetry
    return (
        device.id,
        "online" if device.online else "offline",
        (device.status.package if device.status else None) or "-",
        device.reported.state.value if device.reported else "-",
        _figure(sample.generated_tokens_per_s if sample else None, "{:.1f}"),
        _figure(sample.time_to_first_token_s if sample else None, "{:.3f} s"),
        _figure(sample.worker_peak_rss_bytes if sample else None, "{:.0f} MiB", _MIB),
    )


def _figure(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value / unit)
