"""Running whole agents in tests: one process each, ended by its own id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]


class AgentProcess:
    """An agent with the small engine.

    Args:
        folder: Where its log goes.
        settings: ``key=value`` overrides of the configuration.
        environment: Variables besides those of the test.
    """

    def __init__(self, folder: Path, settings: list[str], environment: dict[str, str] | None = None) -> None:
        self.log = folder / "agent.log"
        python_path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.run_agent", "", *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": python_path, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Ask it to end and return its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._process.kill()
        self._process.wait(10)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait until it ends by itself and return its exit status."""
        return self._process.wait(timeout_s)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()


@contextmanager
def running_agent(
    folder: Path, settings: list[str], environment: dict[str, str] | None = None
) -> Iterator[AgentProcess]:
    """An agent that is killed at the end if it still runs; its log is shown when the test failed."""
    agent = AgentProcess(folder, settings, environment)
    try:
        yield agent
    except BaseException:
        sys.stderr.write(agent.log.read_text(errors="replace"))
        raise
    finally:
        agent.close()
