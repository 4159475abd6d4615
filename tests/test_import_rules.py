"""Who may import whom: the rules that the linter's list of banned modules is too coarse for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "agent" / "lamplighter_agent"
BUILDER = ROOT / "builder" / "lamplighter_builder"
FLEET = ROOT / "fleet" / "lamplighter_fleet"

AGENT_LAYERS = {
    "errors": set(),
    "extras": {"errors"},
    "heap": set(),
    "text": set(),
    "package": {"errors"},
    "arguments": set(),
    "update": {"errors", "package", "arguments"},
    "engine": {"errors", "heap", "package", "arguments"},
    "config": {"errors"},
    "config_file": {"errors", "config"},
    "service": {"errors", "package", "update", "engine", "config", "config_file", "arguments", "text"},
    "cli": {"errors", "update", "engine", "service"},
}
BUILDER_LAYERS = {
    "graph": {"graph", "quantization"},
    "fields": {"fields"},
    "quantization": {"quantization"},
    "components": {"graph", "components", "fields", "quantization"},
    "models": {"graph", "components", "models", "fields"},
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of everything that a module imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def layer_of(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


@pytest.mark.parametrize("path", modules(AGENT), ids=lambda p: str(p.relative_to(AGENT)))
def test_agent_layers_import_only_what_lies_below(path: Path) -> None:
    layer = layer_of(path, AGENT)
    allowed = AGENT_LAYERS.get(layer, set(AGENT_LAYERS)) | {layer, "__version__"}
    for line, name in imports(path):
        top, *rest = name.split(".")
        assert top not in {"lamplighter_builder", "lamplighter_fleet"}, f"line {line}: {name}"
        if top == "lamplighter_agent" and rest:
            assert rest[0] in allowed, f"line {line}: {layer} imports {name}"


@pytest.mark.parametrize("path", modules(BUILDER), ids=lambda p: str(p.relative_to(BUILDER)))
def test_builder_layers_import_only_what_lies_below(path: Path) -> None:
    layer = layer_of(path, BUILDER)
    for line, name in imports(path):
        top, *rest = name.split(".")
        if top == "lamplighter_agent" and rest:
            assert rest[0] in {"errors", "extras", "heap", "package", "text", "__version__"}, f"line {line}: {name}"
        if top == "lamplighter_builder" and rest and layer in BUILDER_LAYERS:
            assert rest[0] in BUILDER_LAYERS[layer], f"line {line}: {layer} imports {name}"


@pytest.mark.parametrize("path", modules(FLEET), ids=lambda p: str(p.relative_to(FLEET)))
def test_fleet_imports_of_the_agent_only_formats_and_messages(path: Path) -> None:
    allowed = (
        "errors",
        "extras",
        "package",
        "service.messages",
        "service.message_codec",
        "service.mqtt_bounds",
        "update.states",
        "update.downgrade",
        "__version__",
    )
    for line, name in imports(path):
        top, _, rest = name.partition(".")
        if top == "lamplighter_agent" and rest:
            assert any(rest == a or rest.startswith(f"{a}.") for a in allowed), f"line {line}: {name}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_importing_every_agent_module_loads_no_builder_dependency() -> None:
    names = [".".join(path.relative_to(AGENT.parent).with_suffix("").parts) for path in modules(AGENT)]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'jinja2', 'gguf', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_main_process_imports_neither_onnxruntime_nor_numpy() -> None:
    result = run_python(
        "import sys, lamplighter_agent.service.app, lamplighter_agent.cli\n"
        "assert 'onnxruntime' not in sys.modules, 'onnxruntime was imported'\n"
        "assert 'numpy' not in sys.modules, 'numpy was imported: 13 MB that the main process has no use for'\n"
    )
    assert result.returncode == 0, result.stderr


def test_onnxruntime_reports_nothing_to_its_maker() -> None:
    result = run_python(
        "import os, sys\n"
        "os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "import lamplighter_agent.engine.session\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", [*modules(AGENT), *modules(BUILDER), *modules(FLEET)], ids=lambda p: p.stem)
def test_modules_that_import_onnxruntime_import_lamplighter_first(path: Path) -> None:
    """Importing anything of ``lamplighter_agent`` sets the variable; onnxruntime reads it when it is first imported."""
    if path.is_relative_to(AGENT):
        return  # its own package's __init__ has run
    lines = {name.split(".")[0]: line for line, name in reversed(list(imports(path)))}
    if "onnxruntime" in lines:
        assert "lamplighter_agent" in lines


@pytest.mark.parametrize(
    ("program", "missing", "extra"),
    [("lamplighter_builder", "torch", "builder"), ("lamplighter_fleet", "cryptography", "fleet")],
)
def test_a_tool_whose_extra_is_not_installed_says_which(program: str, missing: str, extra: str) -> None:
    result = run_python(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
        f"from {program}.__main__ import main\n"
        "sys.exit(main())\n"
    )
    assert result.returncode == 3
    assert f"'{missing}'" in result.stderr
    assert f"pip install 'lamplighter[{extra}]'" in result.stderr
