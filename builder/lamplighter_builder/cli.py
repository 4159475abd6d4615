"""The command line: one function a subcommand, and one place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lamplighter_agent.errors import LamplighterError
from lamplighter_agent.package.manifest import UNKNOWN_LICENCE
from lamplighter_builder import __version__
from lamplighter_builder.quantization.report import comparisons
from lamplighter_builder.terminal_progress import TerminalProgress

if TYPE_CHECKING:
    from lamplighter_agent.package.fidelity import Fidelity
    from lamplighter_agent.package.manifest import Manifest

QUANTIZERS: Final = ("rtn", "least-squares", "gptq")
PRECISIONS: Final = ("int4", "int8", "fp16", "fp32")
PROVIDERS: Final = ("cpu", "cuda", "dml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except LamplighterError as error:
        if arguments.json:
            print(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        print(f"lamplighter-builder: {error.diagnostics()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lamplighter-builder: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="lamplighter-builder", description="Build packages for Lamplighter agents.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_import(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    return parser


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = commands.add_parser("build", help="turn a checkpoint into a package")
    build.add_argument("-m", "--model", required=True, help="a Hugging Face directory, a GGUF file, or a hub id")
    build.add_argument("-o", "--output", required=True, type=Path, help="directory of the package, missing or empty")
    build.add_argument("-p", "--precision", required=True, choices=PRECISIONS, help="of the weights")
    build.add_argument("-e", "--execution-provider", default="cpu", choices=PROVIDERS, help="where it will run")
    _add_quantization(build)
    build.add_argument("--adapter", type=Path, help="directory of a LoRA adapter (PEFT) to merge into the model")
    build.add_argument("-c", "--cache", type=Path, help="directory for downloads, used with a hub id")
    build.add_argument("--name", help="package name; made from the checkpoint's if not given")
    build.add_argument("--version", dest="package_version", default="1.0.0", help="package version (default: 1.0.0)")
    build.add_argument("--licence", help="SPDX expression (default: what the checkpoint states)")
    build.add_argument("--chat-format", type=Path, help="JSON file with a chat format, instead of the chat template")
    build.add_argument("--json", action="store_true", help="print the result as JSON")
    build.set_defaults(run=run_build)


def _positive(text: str) -> float:
    """Read a positive finite number."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def _not_negative(text: str) -> float:
    """Read zero or a positive finite number."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is neither zero nor a positive number")
    return number


def _add_quantization(build: argparse.ArgumentParser) -> None:
    build.add_argument(
        "-q", "--quantizer", choices=QUANTIZERS, help="how matrices are rounded (default: least-squares)"
    )
    build.add_argument("--target-mb", type=_positive, metavar="MB", help="most megabytes of the model; implies -q gptq")
    build.add_argument("--bits-per-weight", type=_positive, metavar="BITS", help="the same bound; implies -q gptq")
    build.add_argument(
        "--max-slowdown",
        type=_positive,
        metavar="PERCENT",
        help="with a size: how much longer than with plain INT4 a decode step may take, estimated "
        "(default: 10 up to 1.2 times the size of plain INT4, else any)",
    )
    build.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 text to listen to instead of the builder's own; implies -q gptq; may be repeated",
    )
    build.add_argument(
        "--max-kl", type=_not_negative, metavar="NATS", help="fail if the package diverges more than this"
    )
    build.add_argument("--no-fidelity", action="store_true", help="do not compare the package with the checkpoint")


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = commands.add_parser("import", help="turn a model folder of onnxruntime-genai into a package")
    add.add_argument("folder", type=Path, help="directory with genai_config.json")
    add.add_argument("-o", "--output", required=True, type=Path, help="directory of the package, missing or empty")
    add.add_argument("--name", help="package name; made from the folder's if not given")
    add.add_argument("--version", dest="package_version", default="1.0.0", help="package version (default: 1.0.0)")
    add.add_argument("--licence", help="SPDX expression (default: unknown, since such a folder states none)")
    add.add_argument("--chat-format", type=Path, help="JSON file with a chat format, instead of the chat template")
    add.add_argument("--json", action="store_true", help="print the result as JSON")
    add.set_defaults(run=run_import)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser("inspect", help="show what is in a package")
    inspect.add_argument("package", type=Path, help="package directory")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=run_inspect)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser("evaluate", help="compare packages with the checkpoint that they were built from")
    evaluate.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE", help="package directory")
    evaluate.add_argument("--reference", required=True, help="a Hugging Face directory, a GGUF file, or a hub id")
    evaluate.add_argument("--text", type=Path, help="UTF-8 text to compare on, instead of the builder's own")
    evaluate.add_argument("-c", "--cache", type=Path, help="directory for downloads, used with a hub id")
    evaluate.add_argument("--json", action="store_true", help="print as JSON")
    evaluate.set_defaults(run=run_evaluate)


def run_build(arguments: argparse.Namespace) -> int:
    """Build a package.

    Raises:
        LamplighterError: If it cannot be built.
    """
    # Imported here, so that --help and a wrong call answer at once.
    from lamplighter_builder.build import BuildOptions, build_package
    from lamplighter_builder.precision import QuantizationOptions
    from lamplighter_builder.sources import default_name, open_checkpoint, read_chat_format

    checkpoint = open_checkpoint(arguments.model, arguments.cache, arguments.adapter)
    listens = arguments.target_mb is not None or arguments.bits_per_weight is not None or arguments.calibration
    options = BuildOptions(
        output=arguments.output,
        precision=arguments.precision,
        execution_provider=arguments.execution_provider,
        name=arguments.name or default_name(checkpoint.name, arguments.precision, arguments.execution_provider),
        version=arguments.package_version,
        licence=arguments.licence,
        chat_format=None if arguments.chat_format is None else read_chat_format(arguments.chat_format),
        quantization=QuantizationOptions(
            quantizer=arguments.quantizer or ("gptq" if listens else "least-squares"),
            target_bytes=None if arguments.target_mb is None else int(arguments.target_mb * 1e6),
            bits_per_weight=arguments.bits_per_weight,
            max_slowdown=None if arguments.max_slowdown is None else arguments.max_slowdown / 100,
            calibration=tuple(arguments.calibration),
        ),
        measure_fidelity=not arguments.no_fidelity,
        max_kl=arguments.max_kl,
    )
    return _make_package(lambda progress: build_package(checkpoint, options, progress), arguments)


def _make_package(work: Callable[[TerminalProgress], Manifest], arguments: argparse.Namespace) -> int:
    """Run ``work`` under a shown progress and print what it made."""
    progress = TerminalProgress(sys.stderr)
    # A build that is told to end unwinds, so that it leaves nothing behind.
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        manifest = work(progress)
    finally:
        signal.signal(signal.SIGTERM, previous)
        progress.close()
    if manifest.licence == UNKNOWN_LICENCE:
        print(f"the model's licence is not stated; the package says {UNKNOWN_LICENCE}: name it with --licence "
              "SPDX-EXPRESSION before you pass the package on", file=sys.stderr)  # fmt: skip
    if manifest.chat_format is None:
        print("there is no chat template: the package continues texts, and takes no messages unless it is made with "
              "--chat-format FILE", file=sys.stderr)  # fmt: skip
    if arguments.json:
        facts = {"package": manifest.reference, "directory": str(arguments.output), "bytes": manifest.total_bytes}
        print(json.dumps(facts))
    else:
        print(f"{arguments.output}: package {manifest.reference}, {manifest.total_bytes / 1e6:.1f} MB")
        if manifest.fidelity is not None:
            print_fidelity(manifest.fidelity)
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Turn a model folder of onnxruntime-genai into a package.

    Raises:
        LamplighterError: If it cannot become one.
    """
    from lamplighter_builder.genai_import import ImportOptions, import_package
    from lamplighter_builder.sources import package_name, read_chat_format

    options = ImportOptions(
        output=arguments.output,
        name=arguments.name or package_name(arguments.folder.resolve().name),
        version=arguments.package_version,
        licence=arguments.licence,
        chat_format=None if arguments.chat_format is None else read_chat_format(arguments.chat_format),
    )
    return _make_package(lambda progress: import_package(arguments.folder, options, progress), arguments)


def run_inspect(arguments: argparse.Namespace) -> int:
    """Show what is in a package.

    Raises:
        LamplighterError: If it is no package.
    """
    from lamplighter_builder.inspection import inspect_package

    facts = inspect_package(arguments.package)
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key, value in facts.items():
        print(f"{key}: {value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items())}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Compare packages with their reference.

    Raises:
        LamplighterError: If one of them cannot be used.
    """
    from lamplighter_builder.comparison import evaluate_packages
    from lamplighter_builder.sources import open_checkpoint

    checkpoint = open_checkpoint(arguments.reference, arguments.cache, None)
    progress = TerminalProgress(sys.stderr)
    try:
        found = evaluate_packages(arguments.packages, checkpoint, arguments.text, progress)
    finally:
        progress.close()
    results = dict(zip(map(str, arguments.packages), found, strict=True))
    if arguments.json:
        print(json.dumps({path: msgspec.to_builtins(fidelity) for path, fidelity in results.items()}))
    else:
        for path, fidelity in results.items():
            print_fidelity(fidelity, f"{path}: ")
    return 0


def print_fidelity(fidelity: Fidelity, before: str = "") -> None:
    """Print what a comparison found, and what to beware of."""
    from lamplighter_builder.evaluation import warnings_of

    for line in describe_fidelity(fidelity):
        print(f"{before}{line}")
    for warning in warnings_of(fidelity):
        print(f"{before}warning: {warning}")


def describe_fidelity(fidelity: Fidelity) -> list[str]:
    """Return lines about a comparison."""
    line = (
        f"KL {fidelity.kl_mean:.4f} nats (median {fidelity.kl_median:.4f}, p99 {fidelity.kl_p99:.3f}), "
        f"top-1 agreement {fidelity.top1_agreement:.1%}"
    )
    if fidelity.perplexity is not None:
        line += f", perplexity {fidelity.perplexity:.2f} (reference {fidelity.reference_perplexity:.2f})"
    return [f"{line}, {fidelity.tokens} tokens", *(f"{about}: {told}" for about, told in comparisons(fidelity).items())]


if __name__ == "__main__":
    sys.exit(main())
