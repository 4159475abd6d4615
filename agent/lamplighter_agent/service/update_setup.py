"""An updater as the configuration describes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from lamplighter_agent.config import AgentConfig, LimitsConfig
from lamplighter_agent.engine.memory import MachineMemory, plan_memory, read_machine_memory
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.errors import ConfigError
from lamplighter_agent.package.limits import TrialLimits
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update.compatibility import this_device
from lamplighter_agent.update.deadlines import StateDeadlines
from lamplighter_agent.update.downloader import DownloadOptions, HttpSource
from lamplighter_agent.update.hooks import UpdateHooks, UpdateOptions
from lamplighter_agent.update.ledger import Ledger
from lamplighter_agent.update.sources import Source
from lamplighter_agent.update.store import Store
from lamplighter_agent.update.trust import read_root
from lamplighter_agent.update.updater import Updater

_MIB: Final = 1024 * 1024


def make_updater(
    config: AgentConfig,
    store: Store,
    hooks: UpdateHooks,
    *,
    source: Source | None = None,
    ledger: Ledger | None = None,
) -> Updater:
    """Return an updater for the configured repository.

    Args:
        config: The whole configuration.
        store: The packages of this device.
        hooks: The rest of the agent.
        source: Another place to read the repository from, such as a USB stick; None: ``repository.url``.
        ledger: What is remembered about updates; None opens that of the store.

    Raises:
        ConfigError: If the repository's URL or the trusted root is not configured or cannot be read.
    """
    repository = config.repository
    if source is None:
        if repository.url is None:
            raise ConfigError("repository.url is not set", hint="set it to where packages are published")
        source = HttpSource(
            repository.url,
            timeout_s=repository.connect_timeout_s,
            ca_file=repository.ca_file,
            proxy=repository.proxy,
        )
    budget_mb = config.engine.memory_budget_mb
    if repository.root_file is None:
        raise ConfigError(
            "repository.root_file is not set", hint="set it to the root.json that the operator handed out"
        )
    return Updater(
        store,
        source,
        root=read_root(repository.root_file),
        device=this_device(None if budget_mb is None else budget_mb * _MIB, check_memory=_memory_check(config)),
        hooks=hooks,
        options=_options(config),
        ledger=ledger,
    )


def _options(config: AgentConfig) -> UpdateOptions:
    repository, updates = config.repository, config.updates
    download = DownloadOptions(
        timeout_s=repository.connect_timeout_s,
        low_speed_bytes_per_s=repository.low_speed_bytes_per_s,
        low_speed_time_s=repository.low_speed_time_s,
        speed_limit_bytes_per_s=repository.speed_limit_bytes_per_s,
        retries=repository.retries,
    )
    return UpdateOptions(
        download=download,
        parallel_downloads=repository.parallel_downloads,
        keep_packages=repository.keep_packages,
        deadlines=StateDeadlines(
            downloading_s=updates.download_deadline_s,
            preparing_s=updates.trial_deadline_s,
            trying_s=updates.trial_deadline_s,
            activating_s=updates.trial_deadline_s,
        ),
        window=updates.window,
        limits=_limits(updates.limits),
    )


def _limits(config: LimitsConfig) -> TrialLimits:
    return TrialLimits(
        min_generated_tokens_per_s=config.min_generated_tokens_per_s,
        max_first_token_s=config.max_first_token_s,
        max_load_s=config.max_load_s,
        max_peak_rss_bytes=None if config.max_memory_mb is None else config.max_memory_mb * _MIB,
    )


def _memory_check(config: AgentConfig) -> Callable[[Manifest], object]:
    """Return a check whether any memory plan of a package fits this machine, with nothing else running on it.

    What is free at the moment of the trial is for the trial to find out.
    """
    budget_mb = config.engine.memory_budget_mb
    options = EngineOptions(
        memory_budget_bytes=None if budget_mb is None else budget_mb * _MIB,
        max_context_tokens=config.engine.max_context_tokens,
        slots=config.engine.slots,
    )

    def check(manifest: Manifest) -> object:
        limit = read_machine_memory().limit_bytes
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        machine = MachineMemory(available_bytes=total if limit is None else min(total, limit), process_bytes=0)
        return plan_memory(manifest, machine, options)

    return check
