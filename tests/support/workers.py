"""Running engine workers in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lamplighter_agent.service.worker import EngineWorker, WorkerSpec


@asynccontextmanager
async def running(spec: WorkerSpec) -> AsyncIterator[EngineWorker]:
    """A started worker, stopped at the end."""
    worker = EngineWorker(spec)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop(grace_s=0.0)
