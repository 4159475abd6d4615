"""When the watchdog is fed, and when not."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from lamplighter_agent.service.liveness import Liveness


def wait(event: threading.Event) -> None:
    event.wait(20)


def test_all_is_well_and_the_disk_is_tried(tmp_path: Path) -> None:
    async def look() -> str | None:
        liveness = Liveness(tmp_path, None, lambda: True)
        fault = liveness.fault(1.0)
        async with asyncio.timeout(10):
            while not (tmp_path / ".alive").exists():  # noqa: ASYNC110 (written by a thread)
                await asyncio.sleep(0.001)
        await liveness.stop()
        return fault

    assert asyncio.run(look()) is None


def test_a_disk_that_does_not_answer_is_a_fault(tmp_path: Path) -> None:
    released = threading.Event()

    async def look() -> str | None:
        liveness = Liveness(tmp_path, None, lambda: True, probe=lambda _path: wait(released))
        assert liveness.fault(0.0) is None
        await asyncio.sleep(0.01)
        fault = liveness.fault(0.0)
        released.set()
        return fault

    assert asyncio.run(look()) == f"the disk with {tmp_path} does not answer"


def test_a_disk_that_refuses_is_logged_and_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    async def look() -> str | None:
        liveness = Liveness(tmp_path, None, lambda: True, probe=refuse)
        liveness.fault(0.0)
        async with asyncio.timeout(10):
            while not caplog.records:  # noqa: ASYNC110 (logged by a task)
                await asyncio.sleep(0.001)
        return liveness.fault(0.0)

    assert asyncio.run(look()) is None
    assert "No space left" in caplog.text


def test_an_engine_that_nobody_watches_is_a_fault(tmp_path: Path) -> None:
    async def look() -> str | None:
        return Liveness(tmp_path, None, lambda: False).fault(1.0)

    assert asyncio.run(look()) == "nobody watches the engine any more"
