"""The command line: one function a subcommand, and one place where errors become messages and exit codes.

Modules that bring heavy libraries are imported by the subcommand that needs them, so that the rest starts at once and
``run``, which lives for months, never loads the inference runtime into its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import msgspec

from lamplighter_agent import __version__
from lamplighter_agent.config import AgentConfig, load_config
from lamplighter_agent.errors import ConfigError, LamplighterError, RequestError, ServiceError
from lamplighter_agent.package.chat_format import ChatMessage
from lamplighter_agent.package.manifest import Manifest, manifest_schema
from lamplighter_agent.service.local_client import read_status
from lamplighter_agent.update.states import PackageRef, UpdateReport

if TYPE_CHECKING:
    from lamplighter_agent.engine.generate import Engine, Prompt
    from lamplighter_agent.engine.options import EngineOptions
    from lamplighter_agent.engine.params import GenerationParams
    from lamplighter_agent.update.updater import Updater

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_MIB = 1024 * 1024
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        code: int = arguments.run(arguments)
    except LamplighterError as error:
        if arguments.json:
            print(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        print(f"lamplighter-agent: {error.diagnostics()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more; keep the interpreter from complaining at exit
        return 1
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="lamplighter-agent", description="Run a language-model package on this box.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = _add(commands, "run", run_agent, "run as a service: MQTT, local API, updates, telemetry")
    _add_config(run)
    serve = _add(
        commands, "serve", serve_package, "serve one package over the OpenAI API on a Unix socket, nothing else"
    )
    serve.add_argument("package", type=Path, help="package directory")
    serve.add_argument("--socket", type=Path, required=True, help="path of the Unix socket")
    _add_engine(serve)
    generate = _add(commands, "generate", generate_text, "answer a prompt; without one, chat in the terminal")
    generate.add_argument("package", type=Path, help="package directory")
    generate.add_argument("prompt", nargs="?", help="the prompt; '-' reads it from standard input")
    _add_engine(generate)
    _add_sampling(generate)
    bench = _add(commands, "bench", bench_package, "measure a package on this machine")
    bench.add_argument("package", type=Path, help="package directory")
    bench.add_argument("--runs", type=int, default=3, help="repetitions; figures are medians (default: 3)")
    bench.add_argument("--prompt-tokens", type=int, default=512, help="length of the prefill prompt (default: 512)")
    bench.add_argument("--generated-tokens", type=int, default=200, help="tokens to decode (default: 200)")
    _add_engine(bench)
    verify = _add(commands, "verify", verify_package, "check every file of a package against its manifest")
    verify.add_argument("package", type=Path, help="package directory")
    pull = _add(commands, "pull", pull_package, "fetch a signed package into the store without running it")
    pull.add_argument("reference", nargs="?", help="NAME/VERSION; without it the signed packages are listed")
    pull.add_argument("--from", dest="source", type=Path, help="read the repository from this directory (a USB stick)")
    _add_config(pull)
    status = _add(commands, "status", show_status, "ask the running agent how it is")
    status.add_argument("--socket", type=Path, help="the agent's socket (default: from the configuration)")
    _add_config(status)
    rollback = _add(commands, "rollback", roll_back, "switch back to the previous package")
    _add_config(rollback)
    _add(commands, "schema", print_schema, "print the JSON Schema of the package manifest")
    return parser


def _add(
    commands: _Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--json", action="store_true", help="print for a machine")
    command.set_defaults(run=function)
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, help="configuration file (default: built-in defaults)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. mqtt.host=broker"
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--memory-budget-mb", type=int, help="most memory to plan for (default: what is there)")
    command.add_argument("--max-context-tokens", type=int, help="most tokens of prompt and answer")
    command.add_argument("--threads", type=int, help="compute threads (default: the physical cores)")
    command.add_argument("--prepared", type=Path, help="directory of copies prepared for this CPU; made if missing")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--system", help="system message")
    command.add_argument("--raw", action="store_true", help="complete the prompt as it is, without the chat format")
    command.add_argument("--max-tokens", type=int, help="most tokens to generate")
    command.add_argument("--temperature", type=float, help="0 picks the most likely token")
    command.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    command.add_argument("--top-p", type=float, help="sample from the most likely tokens up to this probability")
    command.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")
    command.add_argument("--repetition-penalty", type=float, help="above 1: avoid tokens that occurred")
    command.add_argument("--seed", type=int, help="same seed, same text")
    command.add_argument("--stop", action="append", default=[], help="end at this text; may be given several times")


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
    from lamplighter_agent.service.app import serve

    logging.getLogger().setLevel(logging.INFO)
    return serve(arguments.package, arguments.socket, _options(arguments), prepared_root=_prepare(arguments))


def generate_text(arguments: argparse.Namespace) -> int:
    """Answer one prompt, or chat.

    Raises:
        LamplighterError: If the package cannot be loaded or the request not be served.
    """
    from lamplighter_agent.engine.generate import Engine

    params = _params(arguments)
    engine = Engine.load(arguments.package, options=_options(arguments), prepared_root=_prepare(arguments))
    if arguments.prompt is None:
        return _chat(engine, params, arguments.system)
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt = text if arguments.raw or engine.manifest.chat_format is None else _messages(arguments.system, text)
    _answer(engine, prompt, params, as_json=arguments.json)
    return 0


def bench_package(arguments: argparse.Namespace) -> int:
    """Measure a package next to a bare loop on the same session.

    Raises:
        LamplighterError: If the package cannot be loaded.
    """
    from lamplighter_agent.engine.bench import run_bench

    result = run_bench(
        arguments.package,
        options=_options(arguments),
        prepared_root=_prepare(arguments),
        runs=arguments.runs,
        prompt_tokens=arguments.prompt_tokens,
        generated_tokens=arguments.generated_tokens,
    )
    if arguments.json:
        print(msgspec.json.encode(result).decode())
        return 0
    for name, value in msgspec.structs.asdict(result).items():
        print(f"{name:28} {_shown(name, value)}")
    return 0


def verify_package(arguments: argparse.Namespace) -> int:
    """Check a package directory: the manifest's rules, length and sha256 of every file, and that nothing else is there.

    Raises:
        PackageError: Naming the first file that is missing, not listed, or not what the manifest says.
    """
    from lamplighter_agent.update.installed import verify_package as verify

    manifest = verify(arguments.package)
    if arguments.json:
        print(json.dumps({"package": manifest.reference, "files": len(manifest.files), "bytes": manifest.total_bytes}))
        return 0
    for entry in manifest.files:
        print(f"{entry.name:24} {entry.length:>12}  {entry.sha256}  ok")
    print(f"{manifest.reference}: {len(manifest.files)} files, {manifest.total_bytes} bytes, all as in the manifest")
    return 0


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
    status = read_status(socket)
    if arguments.json:
        print(msgspec.json.encode(status).decode())
        return 0
    for name, value in msgspec.structs.asdict(status).items():
        if value is not None:
            print(f"{name:28} {_shown(name, value)}")
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


def print_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of the manifest."""
    del arguments
    sys.stdout.write(manifest_schema().decode())
    return 0


def _config(arguments: argparse.Namespace) -> AgentConfig:
    return load_config(arguments.config, arguments.set)


def _updater(config: AgentConfig, source: Path | None) -> Updater:
    """Return an updater that works beside no service: it tries and switches nothing, and prints its progress."""
    from lamplighter_agent.service.updates import make_updater
    from lamplighter_agent.update.sources import DirectorySource
    from lamplighter_agent.update.store import Store
    from lamplighter_agent.update.updater import UpdateHooks

    def no_trial(package: Path, manifest: Manifest) -> NoReturn:
        raise ServiceError(f"{manifest.reference} in {package} can only be tried by a running agent")

    hooks = UpdateHooks(
        prepare=lambda package, manifest: None, trial=no_trial, activate=lambda reference: None, report=_show_report
    )
    store = Store(config.state_dir, reserve_bytes=config.repository.disk_reserve_bytes)
    return make_updater(config, store, hooks, source=None if source is None else DirectorySource(source))


def _show_report(report: UpdateReport) -> None:
    line = f"{report.package}/{report.version}: {report.state.value}"
    if report.bytes_total:
        line += f" {report.progress:4.0%} of {report.bytes_total / _MIB:.1f} MiB"
    begin, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
    print(f"{begin}{line}", file=sys.stderr, end=end, flush=True)


def _shown(name: str, value: object) -> str:
    """Return a figure with its unit as a person reads it; the unit is the end of its name."""
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value / _MIB:.0f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _options(arguments: argparse.Namespace) -> EngineOptions:
    from lamplighter_agent.engine.options import EngineOptions

    budget = arguments.memory_budget_mb
    return EngineOptions(
        memory_budget_bytes=None if budget is None else budget * _MIB,
        max_context_tokens=arguments.max_context_tokens,
        threads=arguments.threads,
    )


def _prepare(arguments: argparse.Namespace) -> Path | None:
    """Make the prepared copy if one is asked for; return the directory that holds it."""
    root: Path | None = arguments.prepared
    if root is not None:
        from lamplighter_agent.engine.prepare import prepare

        prepare(arguments.package, root)
    return root


def _params(arguments: argparse.Namespace) -> GenerationParams:
    from lamplighter_agent.engine.params import GenerationParams

    params = GenerationParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    params.validate()
    return params


def _messages(system: str | None, user: str) -> list[ChatMessage]:
    head = [] if system is None else [ChatMessage("system", system)]
    return [*head, ChatMessage("user", user)]


def _chat(engine: Engine, params: GenerationParams, system: str | None) -> int:
    """Talk in the terminal until end of file; Ctrl-C ends an answer, and the program where there is none."""
    opening = [] if system is None else [ChatMessage("system", system)]
    messages = list(opening)
    print(f"{engine.manifest.reference}: /reset forgets the conversation, Ctrl-D ends it", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append(ChatMessage("user", line))
            messages.append(ChatMessage("assistant", _answer(engine, messages, params, as_json=False)))


def _answer(engine: Engine, prompt: Prompt, params: GenerationParams, *, as_json: bool) -> str:
    """Generate and print, as it comes or as one JSON line at the end; return the text."""
    parts: list[str] = []
    finished = None
    try:
        for token in engine.generate(prompt, params):
            parts.append(token.text)
            finished = token.finished
            if not as_json:
                print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        if as_json:
            raise
    if as_json and finished is not None:
        result = {"text": "".join(parts), "finish_reason": finished.finish_reason}
        figures = {"usage": finished.usage, "timings": finished.timings}
        print(msgspec.json.encode({"package": engine.manifest.reference, **result, **figures}).decode())
    else:
        print()
    return "".join(parts)
