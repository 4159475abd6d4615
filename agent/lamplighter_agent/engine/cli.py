"""The engine's commands: one package on this machine, without a service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lamplighter_agent.arguments import MIB, Commands, add_command, shown
from lamplighter_agent.engine.generation_arguments import add_generation_arguments, generation_params
from lamplighter_agent.errors import RequestError
from lamplighter_agent.package.chat_format import ChatMessage

if TYPE_CHECKING:
    from lamplighter_agent.engine.events import TokenLogprob
    from lamplighter_agent.engine.generate import Engine
    from lamplighter_agent.engine.options import EngineOptions
    from lamplighter_agent.engine.params import GenerationParams
    from lamplighter_agent.engine.prompts import Prompt


def add_commands(commands: Commands) -> None:
    """Add ``generate`` and ``bench``."""
    generate = add_command(commands, "generate", generate_text, "answer a prompt; without one, chat in the terminal")
    generate.add_argument("package", type=Path, help="package directory")
    generate.add_argument("prompt", nargs="?", help="the prompt; '-' reads it from standard input")
    add_engine_arguments(generate)
    _add_sampling(generate)
    bench = add_command(commands, "bench", bench_package, "measure a package on this machine")
    bench.add_argument("package", type=Path, help="package directory")
    bench.add_argument("--runs", type=int, default=3, help="repetitions; figures are medians (default: 3)")
    bench.add_argument("--prompt-tokens", type=int, default=512, help="length of the prefill prompt (default: 512)")
    bench.add_argument("--generated-tokens", type=int, default=200, help="tokens to decode (default: 200)")
    add_engine_arguments(bench)


def generate_text(arguments: argparse.Namespace) -> int:
    """Answer one prompt, or chat.

    Raises:
        LamplighterError: If the package cannot be loaded or the request not be served.
    """
    from lamplighter_agent.engine.generate import Engine

    params = generation_params(arguments)
    engine = Engine.load(arguments.package, options=engine_options(arguments), prepared_root=prepared_root(arguments))
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
        options=engine_options(arguments),
        prepared_root=prepared_root(arguments),
        runs=arguments.runs,
        prompt_tokens=arguments.prompt_tokens,
        generated_tokens=arguments.generated_tokens,
    )
    if arguments.json:
        print(msgspec.json.encode(result).decode())
        return 0
    for name, value in msgspec.structs.asdict(result).items():
        print(f"{name:28} {shown(name, value)}")
    return 0


def add_engine_arguments(command: argparse.ArgumentParser) -> None:
    """Add the engine's limits and choices."""
    command.add_argument("--memory-budget-mb", type=int, help="most memory to plan for (default: what is there)")
    command.add_argument("--max-context-tokens", type=int, help="most tokens of prompt and answer")
    command.add_argument("--kv-cache-dtype", choices=("float32", "int8"), help="default: int8 where memory is small")
    command.add_argument("--prompt-weights", action="store_true", help="weights of their own for prompts, if faster")
    command.add_argument("--threads", type=int, help="compute threads (default: the physical cores)")
    command.add_argument("--prepared", type=Path, help="directory of copies prepared for this CPU; made if missing")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--system", help="system message")
    command.add_argument("--raw", action="store_true", help="complete the prompt as it is, without the chat format")
    add_generation_arguments(command)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Return what the arguments of ``add_engine_arguments`` say."""
    from lamplighter_agent.engine.options import EngineOptions

    budget = arguments.memory_budget_mb
    return EngineOptions(
        memory_budget_bytes=None if budget is None else budget * MIB,
        max_context_tokens=arguments.max_context_tokens,
        kv_cache_dtype=arguments.kv_cache_dtype,
        threads=arguments.threads,
        prompt_weights=arguments.prompt_weights,
    )


def prepared_root(arguments: argparse.Namespace) -> Path | None:
    """Make the prepared copy if one is asked for; return the directory that holds it.

    Raises:
        LamplighterError: If it cannot be made.
    """
    root: Path | None = arguments.prepared
    if root is not None:
        from lamplighter_agent.engine.prepare import prepare

        prepare(arguments.package, root, prompts="faster" if arguments.prompt_weights else "none")
    return root


def _messages(system: str | None, user: str) -> list[ChatMessage]:
    head = [] if system is None else [ChatMessage("system", system)]
    return [*head, ChatMessage("user", user)]


def _chat(engine: Engine, params: GenerationParams, system: str | None) -> int:
    """Talk in the terminal until end of file; Ctrl-C ends an answer, and the program where there is none.

    Raises:
        RequestError: If the package has no chat format.
    """
    if engine.manifest.chat_format is None:
        raise RequestError(
            f"{engine.manifest.reference} has no chat format, so it cannot chat",
            param="messages",
            hint="give a text on the command line, which it continues",
        )
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
    """Generate and print, as it comes or as one JSON line at the end; return the first answer's text."""
    texts: dict[int, str] = {0: ""}
    logprobs: dict[int, list[TokenLogprob]] = {}
    finished = None
    live = not as_json and params.n == 1
    try:
        for token in engine.generate(prompt, params):
            texts[token.index] = texts.get(token.index, "") + token.text
            if token.logprobs:
                logprobs.setdefault(token.index, []).extend(token.logprobs)
            finished = token.finished
            if live:
                print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        if as_json:
            raise
    if as_json and finished is not None:
        result = {"text": texts[0], "finish_reason": finished.finish_reason, "logprobs": logprobs.get(0)}
        choices = [
            {"text": texts.get(choice.index, ""), "logprobs": logprobs.get(choice.index), **msgspec.to_builtins(choice)}
            for choice in finished.choices
        ]
        figures = {"choices": choices, "usage": finished.usage, "timings": finished.timings}
        print(msgspec.json.encode({"package": engine.manifest.reference, **result, **figures}).decode())
    elif not live and finished is not None:
        for choice in finished.choices:
            score = "" if choice.score is None else f", score {choice.score:.4f}"
            print(f"--- {choice.index + 1} ({choice.finish_reason}{score})\n{texts.get(choice.index, '')}")
    else:
        print()
    return texts[0]
