"""One package on a Unix socket and nothing else: no broker, no store, no updates."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from lamplighter_agent.config import AgentConfig, LocalApiConfig, MqttConfig
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.service.admission import RequestQueue
from lamplighter_agent.service.app import DRAIN_S, REAL_ENGINE, EngineModules, facts_of, stop_on_signals, stopping
from lamplighter_agent.service.local_api import LocalApi
from lamplighter_agent.service.runner import PackageRunner
from lamplighter_agent.service.telemetry import Sampler
from lamplighter_agent.service.worker import WorkerSpec

logger = logging.getLogger(__name__)


def serve(
    package: Path,
    socket: Path,
    options: EngineOptions,
    *,
    prepared_root: Path | None = None,
    engine: EngineModules = REAL_ENGINE,
) -> int:
    """Serve one package directory on a Unix socket until SIGTERM or SIGINT: no broker, store or updates.

    Args:
        package: The package directory.
        socket: Path of the socket.
        options: Limits and choices for the engine.
        prepared_root: Where copies prepared for this CPU lie, or None.
        engine: What loads and prepares packages.

    Returns:
        The exit status.

    Raises:
        LamplighterError: If the package cannot be loaded or the socket is in use.
    """
    spec = WorkerSpec(
        package=package,
        prepared_root=prepared_root,
        options=options,
        engine=engine.load,
        log_level=logging.getLogger().getEffectiveLevel(),
    )
    asyncio.run(_serve(spec, socket))
    return 0


async def _serve(spec: WorkerSpec, socket: Path) -> None:
    stop = stop_on_signals()
    config = AgentConfig(
        state_dir=socket.parent, mqtt=MqttConfig(enabled=False), local_api=LocalApiConfig(socket=socket)
    )
    requests = RequestQueue(config.requests)
    runner = PackageRunner(spec, requests, lambda: None)
    sampler = Sampler(config, 1, requests, runner, lambda: "idle")
    api = LocalApi(config.local_api, requests, facts_of(sampler, runner))
    api.listen()
    try:
        await runner.switch(spec.package)
        await api.start()
        logger.info("%s answers on %s", runner.package, socket)
        await stop.wait()
        requests.close(stopping())
        await requests.drain(DRAIN_S)
    finally:
        await api.stop()
        await runner.stop(0.0)
