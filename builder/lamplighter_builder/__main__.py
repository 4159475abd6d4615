"""The entry of the command line: checks that the extra is installed before anything of it is imported."""

from __future__ import annotations

import sys

from lamplighter_agent.errors import ConfigError
from lamplighter_agent.extras import require_extra


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        require_extra("builder", ("torch", "transformers", "onnx", "onnx_ir", "gguf", "safetensors", "jinja2"))
    except ConfigError as error:
        sys.stderr.write(f"lamplighter-builder: {error.diagnostics()}\n")
        return error.exit_code
    from lamplighter_builder.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
