"""The optional parts of the distribution: one installation serves boxes and workstations, boxes leave the rest out."""

from __future__ import annotations

import importlib.util

from lamplighter_agent.errors import ConfigError


def require_extra(extra: str, modules: tuple[str, ...]) -> None:
    """Check that the third-party modules of an extra are installed, without importing them.

    Raises:
        ConfigError: Naming the first that is missing and the command that installs them.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"this command needs the Python package {module!r}, which is not installed",
                hint=f"pip install 'lamplighter[{extra}]'",
            )
