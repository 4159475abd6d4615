"""The whole agent as a process, with the small engine: ``python -m support.run_agent CONFIG [KEY=VALUE …]``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from lamplighter_agent.config_file import load_config
from lamplighter_agent.errors import LamplighterError
from lamplighter_agent.service.app import EngineModules, run
from support import fake_engine

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = run(
            load_config(Path(sys.argv[1]) if sys.argv[1] else None, sys.argv[2:]),
            engine=EngineModules(load=fake_engine.ENTRY, prepare=fake_engine.PREPARE),
        )
    except LamplighterError as error:
        sys.stderr.write(error.diagnostics())
        code = error.exit_code
    sys.exit(code)
