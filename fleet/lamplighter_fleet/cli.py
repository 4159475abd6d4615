"""The command line: one function a subcommand, and one place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TextIO, TypeAlias

import msgspec

from lamplighter_agent import __version__
from lamplighter_agent.errors import ConfigError, LamplighterError, PackageError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.service.messages import DeltaReply, FinalReply, PromptMessage, ReportedMessage
from lamplighter_agent.update.states import PackageRef, UpdatePolicy, UpdateState
from lamplighter_fleet.broker import BrokerOptions, connect
from lamplighter_fleet.devices import Device, list_devices
from lamplighter_fleet.keys import KeyDirectory, create_keys
from lamplighter_fleet.prompt import ask_device, ask_group
from lamplighter_fleet.publish import list_packages, publish_package
from lamplighter_fleet.push import push
from lamplighter_fleet.repository import Repository, Signed

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
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
    keys = commands.add_parser("keys", help="make signing keys").add_subparsers(required=True, metavar="ACTION")
    init = _add(keys, "init", init_keys, "make the keys of a new repository and the root that devices trust")
    init.add_argument("directory", type=Path, help="new or empty directory for the keys")
    init.add_argument("--root-days", type=int, default=365, help="days until the root must be renewed (default: 365)")
    init.add_argument("--encrypt", action="store_true", help="encrypt the offline keys with a passphrase")
    _add_passphrase(init)
    publishing = _add(commands, "publish", publish, "put a package into a static repository and sign it")
    publishing.add_argument("package", type=Path, help="package directory")
    _add_repository(publishing)
    refresh = _add(commands, "refresh", refresh_repository, "sign snapshot and timestamp anew before they expire")
    _add_repository(refresh)
    packages = _add(commands, "packages", show_packages, "list the packages that a repository offers")
    _add_repository(packages)
    push_command = _add(
        commands, "push", push_package, "make a package the desired one of a device, follow the outcome"
    )
    push_command.add_argument("reference", help="NAME/VERSION as published")
    push_command.add_argument("--device", required=True, help="the device's id")
    push_command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="give up after (default: 600)")
    push_command.add_argument("--retry-failed", action="store_true", help="try again a version that failed there")
    _add_broker(push_command)
    prompt = _add(commands, "prompt", ask, "ask a device, or one of a group, and print the answer as it streams")
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
    devices = _add(commands, "devices", show_devices, "list the devices and how they are")
    _add_broker(devices)
    return parser


def _add(
    commands: _Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--json", action="store_true", help="print for a machine")
    command.set_defaults(run=function)
    return command


def _add_passphrase(command: argparse.ArgumentParser) -> None:
    command.add_argument("--passphrase-file", type=Path, help="file whose first line opens the encrypted keys")


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument("--repository", type=Path, required=True, help="directory that the web server shows")
    command.add_argument("--keys", type=Path, required=True, help="key directory made by 'keys init'")
    _add_passphrase(command)
    command.add_argument("--ask-passphrase", action="store_true", help="ask for it on the terminal")


def _add_broker(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="127.0.0.1", help="the broker (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=1883, help="its port (default: 1883)")
    command.add_argument("--prefix", default="lamplighter/v1", help="first levels of the topics")
    command.add_argument("--username", help="user name at the broker")
    command.add_argument("--password-file", type=Path, help="file whose first line is the password")
    command.add_argument("--ca-file", type=Path, help="authority of the broker's certificate; switches TLS on")
    command.add_argument("--cert-file", type=Path, help="certificate of this tool")
    command.add_argument("--key-file", type=Path, help="its private key")


def init_keys(arguments: argparse.Namespace) -> int:
    """Make the keys and the root of a new repository.

    Raises:
        LamplighterError: If the directory is in use or cannot be written.
    """
    passphrase = None
    if arguments.passphrase_file is not None:
        passphrase = _first_line(arguments.passphrase_file).encode()
    elif arguments.encrypt:
        passphrase = _new_passphrase()
    created = create_keys(arguments.directory, passphrase=passphrase, root_days=arguments.root_days)
    if arguments.json:
        print(json.dumps({"root": str(created.root), "key_ids": created.key_ids, "expires": str(created.expires)}))
        return 0
    print(
        f"{created.root}: the root that devices trust, valid until {created.expires:%Y-%m-%d}; put it onto every device"
    )
    print(f"{', '.join(map(str, created.offline))}: keep these off the network; publishing needs the targets key")
    print(f"{', '.join(map(str, created.online))}: for the host that publishes and refreshes")
    if passphrase is None:
        print("The keys are not encrypted: --encrypt asks for a passphrase.")
    return 0


def publish(arguments: argparse.Namespace) -> int:
    """Publish a package.

    Raises:
        LamplighterError: If the package is not whole, or the repository cannot be signed or written.
    """
    done = publish_package(arguments.package, _repository(arguments), progress=_show_bytes)
    if arguments.json:
        print(json.dumps({"package": done.reference, "manifest_sha256": done.manifest_sha256,
                          "new_bytes": done.new_bytes, "reused_bytes": done.reused_bytes}))  # fmt: skip
    elif done.signed is None:
        print(f"{done.reference} was published before, just like this")
    else:
        print(f"{done.reference} is published: {done.new_bytes} new bytes, {done.reused_bytes} shared with others")
        print(_validity(done.signed))
    return 0


def refresh_repository(arguments: argparse.Namespace) -> int:
    """Renew the signatures that expire soonest.

    Raises:
        LamplighterError: If nothing is published or a key cannot be used.
    """
    signed = _repository(arguments).refresh()
    if arguments.json:
        print(json.dumps({"snapshot_expires": str(signed.snapshot_expires),
                          "timestamp_expires": str(signed.timestamp_expires)}))  # fmt: skip
    else:
        print(_validity(signed))
    return 0


def show_packages(arguments: argparse.Namespace) -> int:
    """List what a repository offers.

    Raises:
        LamplighterError: If its metadata cannot be trusted.
    """
    packages = list_packages(_repository(arguments))
    if arguments.json:
        print(json.dumps({"packages": [package.reference for package in packages]}))
    else:
        for package in packages:
            print(f"{package.reference:50} {package.manifest_sha256}")
    return 0


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
            policy=UpdatePolicy(retry_failed=arguments.retry_failed),
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


def _repository(arguments: argparse.Namespace) -> Repository:
    keys = KeyDirectory(arguments.keys)
    if arguments.passphrase_file is not None:
        keys = KeyDirectory(arguments.keys, _first_line(arguments.passphrase_file).encode())
    elif arguments.ask_passphrase:
        keys = KeyDirectory(arguments.keys, getpass.getpass("Passphrase of the offline keys: ").encode())
    return Repository(arguments.repository, keys)


def _broker(arguments: argparse.Namespace) -> BrokerOptions:
    return BrokerOptions(
        host=arguments.host,
        port=arguments.port,
        prefix=arguments.prefix,
        username=arguments.username,
        password=None if arguments.password_file is None else _first_line(arguments.password_file),
        ca_file=arguments.ca_file,
        cert_file=arguments.cert_file,
        key_file=arguments.key_file,
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _new_passphrase() -> bytes:
    first = getpass.getpass("Passphrase for the offline keys: ")
    if not first or getpass.getpass("Once more: ") != first:
        raise ConfigError("the two passphrases differ or are empty", hint="run it again")
    return first.encode()


def _show_bytes(done: int, total: int) -> None:
    if sys.stderr.isatty() and total:
        end = "\n" if done >= total else ""
        print(f"\rpublishing {done / total:4.0%}", file=sys.stderr, end=end, flush=True)


def _validity(signed: Signed) -> str:
    return f"signed until {signed.timestamp_expires:%Y-%m-%d}: run 'lamplighter-fleet refresh' before then"


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
