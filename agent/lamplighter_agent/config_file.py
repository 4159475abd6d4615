"""Reads the agent's configuration: YAML and overrides to ``AgentConfig``, with file and line in every complaint."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from lamplighter_agent.config import AgentConfig
from lamplighter_agent.errors import ConfigError


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> AgentConfig:
    """Read a YAML file and apply overrides.

    Args:
        path: The file, or None for the defaults alone.
        overrides: ``section.key=value`` strings, the value in YAML; each wins over the file.

    Raises:
        ConfigError: If the file cannot be read or parsed, a key is unknown (the nearest right name is given), or a
            value is of the wrong type or out of range. The message names file, line and key.
    """
    tree: dict[str, object] = {}
    lines: dict[str, str] = {}
    if path is not None:
        tree, lines = _read(path)
    for override in overrides:
        key, value = _parse_override(override)
        _insert(tree, key, value, override)
        lines[".".join(key)] = f"--set {override}"
    _check_keys(AgentConfig, tree, (), lines, str(path or "the configuration"))
    try:
        return msgspec.convert(tree, AgentConfig, strict=True, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        key_path = re.sub(r"\[.*", "", where.rstrip("`").lstrip("."))
        place = _place(key_path, lines, str(path or "the configuration"))
        raise ConfigError(f"{place}: {key_path or 'the document'}: {message}") from error


def _read(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Return the document and, for each dotted key, ``file:line``."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if document is None:
        return {}, {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: the document must be a mapping of settings, not a {type(document).__name__}")
    lines: dict[str, str] = {}
    _collect_lines(node, (), path, lines)
    return document, lines


def _collect_lines(node: yaml.Node | None, key: tuple[str, ...], path: Path, lines: dict[str, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: a key must be a plain word")
        name = (*key, key_node.value)
        if key_node.value in seen:
            raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: {'.'.join(name)} is given twice")
        seen.add(key_node.value)
        lines[".".join(name)] = f"{path}:{key_node.start_mark.line + 1}"
        _collect_lines(value_node, name, path, lines)


def _parse_override(override: str) -> tuple[tuple[str, ...], object]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        return tuple(key.strip().split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


def _insert(tree: dict[str, object], key: tuple[str, ...], value: object, override: str) -> None:
    for name in key[:-1]:
        child = tree.setdefault(name, {})
        if child is None:
            child = tree[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        tree = child
    tree[key[-1]] = value


def _check_keys(
    struct: type[msgspec.Struct], tree: dict[str, object], key: tuple[str, ...], lines: Mapping[str, str], origin: str
) -> None:
    hints = get_type_hints(struct)
    for name, value in list(tree.items()):
        dotted = ".".join((*key, str(name)))
        if name not in hints:
            near = difflib.get_close_matches(str(name), list(hints), n=1)
            raise ConfigError(
                f"{_place(dotted, lines, origin)}: unknown key {dotted!r}",
                hint=f"did you mean {'.'.join((*key, near[0]))!r}?" if near else f"known here: {', '.join(hints)}",
            )
        section = _section_type(hints[name])
        if section is None:
            continue
        if value is None and not _is_optional(hints[name]):
            tree[name] = value = {}  # a section whose every line is commented out
        if isinstance(value, dict):
            _check_keys(section, value, (*key, str(name)), lines, origin)


def _section_type(annotation: object) -> type[msgspec.Struct] | None:
    """Return the struct that an annotation names, also inside ``Struct | None``; None for plain values."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _is_optional(annotation: object) -> bool:
    return get_origin(annotation) in {Union, types.UnionType} and type(None) in get_args(annotation)


def _place(dotted: str, lines: Mapping[str, str], origin: str) -> str:
    """Return ``file:line`` of the nearest enclosing key that the file has."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        if place := lines.get(".".join(parts[:length])):
            return place
    return origin


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected a path, got `{type(value).__name__}`")
