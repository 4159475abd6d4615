"""What opening a package needs besides the session: whether this machine can run it, prepared copy, caches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from lamplighter_agent.engine.cache_graph import cache_scales
from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.external_data import mapped_bytes
from lamplighter_agent.engine.kv_cache import KVCache
from lamplighter_agent.engine.mapped_pages import release_pages
from lamplighter_agent.engine.memory import (
    MemoryPlan,
    physical_cores,
    plan_memory,
    read_machine_memory,
    with_prompt_weights,
)
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.prefix_files import PrefixFiles
from lamplighter_agent.engine.prepare import (
    check_prepared,
    damaged_file,
    prepared_directory,
    prepared_key,
    prompts_directory,
)
from lamplighter_agent.engine.rotation import key_rotations
from lamplighter_agent.engine.session import (
    EditedGraph,
    ModelSession,
    check_operators,
    edit_graph,
    onnxruntime_version,
)
from lamplighter_agent.engine.tokenizer import PackageTokenizer
from lamplighter_agent.engine.windows import windowed_layers
from lamplighter_agent.errors import EngineError, IncompatiblePackageError, PackageError
from lamplighter_agent.heap import map_large_blocks
from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest, read_manifest

logger = logging.getLogger(__name__)


class OpenedPackage(NamedTuple):
    """A package that is loaded, without caches.

    Attributes:
        manifest: The package's manifest.
        tokenizer: Its tokenizer.
        session: Its model.
        prompts: The same model as it computes prompts faster; None: ``session`` computes them.
        plan: How memory is to be used.
        threads: Compute threads.
        prepared: True if the weights come from a prepared copy.
    """

    manifest: Manifest
    tokenizer: PackageTokenizer
    session: ModelSession
    prompts: ModelSession | None
    plan: MemoryPlan
    threads: int
    prepared: bool


def open_package(package: Path, options: EngineOptions, prepared_root: Path | None) -> OpenedPackage:
    """Open a package's tokenizer and model.

    Args:
        package: The package directory.
        options: Limits and choices, validated.
        prepared_root: Where prepared copies lie; a good one for this machine is used.

    Raises:
        PackageError: If the package cannot be read.
        IncompatiblePackageError: If this machine or agent cannot run it.
        MemoryBudgetError: If it does not fit.
        EngineError: If the runtime fails.
    """
    manifest = read_manifest(package)
    check_target(manifest)
    plan = plan_memory(manifest, read_machine_memory(), options)
    threads = options.threads or physical_cores()
    if plan.unpacked_bytes:
        map_large_blocks()
    spec, unpack = cache_spec(manifest, plan), plan.unpacked_bytes > 0
    open_model = partial(ModelSession, manifest=manifest, threads=threads, cache=spec, unpack=unpack)
    copy = None if prepared_root is None else _find_copy(package, prepared_root)
    prompts_copy, plan = _find_prompts(package, copy, plan) if copy and options.prompt_weights else (None, plan)
    # Beforehand, for onnxruntime must have taken the graph in before the tokenizer's parser keeps all others waiting.
    edited = None if copy is None else _edit_copy(copy, manifest, spec, unpack=unpack)
    with ThreadPoolExecutor(2, "open-model") as executor:
        # onnxruntime packs weights for most of the time and lets other threads run; the tokenizer's parser does not, so
        # it comes last.
        opening: Future[ModelSession | None]
        if copy is None:
            opening = executor.submit(_open_built, package, open_model)
        else:
            opening = executor.submit(_open_copy, copy, partial(open_model, edited=edited))
        opening_prompts = executor.submit(_open_prompts, prompts_copy, open_model)
        damaged = None if copy is None else damaged_file(copy)
        tokenizer = PackageTokenizer.from_file(package / manifest.file("tokenizer").name)
        session, prompts = opening.result(), opening_prompts.result()
    if damaged is not None:
        logger.warning("the package is loaded as built: %s in %s is damaged", damaged, copy)
        session = None
    prepared = copy is not None and session is not None
    if prompts is None or not prepared:
        prompts, plan = None, msgspec.structs.replace(plan, prompt_weights_bytes=0)
    if session is None:
        session = _open_built(package, open_model)
    if not (prompts or session).unpacks:
        plan = msgspec.structs.replace(plan, unpacked_bytes=0)
    return OpenedPackage(manifest, tokenizer, session, prompts, plan, threads, prepared)


def check_target(manifest: Manifest) -> None:
    """Check that a package is for this kind of machine and this runtime.

    Raises:
        IncompatiblePackageError: If it is not.
    """
    target = manifest.target
    if target.execution_provider != "cpu":
        raise IncompatiblePackageError(
            f"{manifest.reference} is built for {target.execution_provider!r}, but this engine runs 'cpu'",
            hint="build the package with -e cpu",
        )
    installed = onnxruntime_version()
    if _version(installed) < _version(target.min_onnxruntime):
        raise IncompatiblePackageError(
            f"{manifest.reference} needs onnxruntime {target.min_onnxruntime}, but {installed} is installed",
            hint="update the agent",
        )


def _version(text: str) -> tuple[int, ...]:
    """Return the leading ``major.minor`` of a version as numbers; parts that are no numbers count as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:2])


def cache_spec(manifest: Manifest, plan: MemoryPlan) -> CacheSpec:
    """Return the shape of the cache that the plan wants."""
    windowed = windowed_layers(manifest.model, plan.max_context_tokens) if plan.kv_window_bytes else None
    return CacheSpec.from_model(manifest.model, plan.kv_cache_dtype, windowed)


def make_cache(manifest: Manifest, plan: MemoryPlan) -> KVCache:
    """Return an empty cache as the plan wants it.

    Raises:
        MemoryBudgetError: If the system refuses the address space.
    """
    scales = None
    if plan.kv_cache_dtype == "int8" and manifest.cache_scales is not None:
        scales = tuple(key for key, _ in cache_scales(manifest.cache_scales, manifest.model))
    return KVCache(
        cache_spec(manifest, plan),
        slots=plan.slots,
        capacity=plan.max_context_tokens,
        rotations=key_rotations(manifest.model, scales),
    )


def open_prefix_files(package: Path, root: Path, manifest: Manifest, plan: MemoryPlan, max_bytes: int) -> PrefixFiles:
    """Return the prefixes that are kept on disk for a package and a kind of cache, up to ``max_bytes``."""
    key, spec = prepared_key(package), cache_spec(manifest, plan)
    return PrefixFiles(
        root,
        f"{key.manifest_sha256} {key.cpu} {key.onnxruntime} {spec} {plan.prompt_weights_bytes > 0} "
        f"{plan.unpacked_bytes > 0}",
        spec,
        vocab_size=manifest.model.vocab_size,
        max_bytes=max_bytes,
    )


def _find_copy(package: Path, root: Path) -> Path | None:
    """Return the directory of the prepared copy; None, with the reason logged, if it cannot be used."""
    key = prepared_key(package)
    directory = prepared_directory(root, key)
    reason = check_prepared(directory, key)
    if reason is not None:
        logger.warning("the package is loaded as built: %s", reason)
        return None
    return directory


def _find_prompts(package: Path, copy: Path, plan: MemoryPlan) -> tuple[Path | None, MemoryPlan]:
    """Return the directory of a copy's model for prompts, and the plan with it; None if there is none, or no room."""
    directory = prompts_directory(copy, prepared_key(package))
    if directory is None:
        return None, plan
    try:
        plan = with_prompt_weights(plan, mapped_bytes(directory / MODEL_NAME))
    except (PackageError, OSError) as error:
        logger.warning("prompts are computed with the weights for decoding: %s", error)
    return directory if plan.prompt_weights_bytes else None, plan


def _edit_copy(directory: Path, manifest: Manifest, cache: CacheSpec, *, unpack: bool) -> EditedGraph | None:
    """Return a prepared copy's graph for a cache; None if it cannot be read, which opening it tells."""
    try:
        return edit_graph(directory / MODEL_NAME, manifest, cache, unpack=unpack)
    except PackageError:
        return None


def _open_copy(directory: Path, open_model: Callable[[Path], ModelSession]) -> ModelSession | None:
    """Open a prepared copy, on which nothing may run before its checksums agree; None if it does not open."""
    try:
        session = open_model(directory / MODEL_NAME)
    except (PackageError, EngineError) as error:
        logger.warning("the package is loaded as built: the prepared copy does not open: %s", error.message)
        return None
    release_pages(directory / WEIGHTS_NAME)
    return session


def _open_prompts(directory: Path | None, open_model: Callable[[Path], ModelSession]) -> ModelSession | None:
    """Open a copy's model for prompts and check it; None, with the reason logged, if it cannot be used."""
    if directory is None:
        return None
    try:
        session = open_model(directory / MODEL_NAME)
    except (PackageError, EngineError) as error:
        logger.warning("prompts are computed with the weights for decoding: %s", error.message)
        return None
    damaged = damaged_file(directory)
    if damaged is not None:
        logger.warning("prompts are computed with the weights for decoding: %s in %s is damaged", damaged, directory)
        return None
    release_pages(directory / WEIGHTS_NAME)
    return session


def _open_built(package: Path, open_model: Callable[[Path], ModelSession]) -> ModelSession:
    check_operators(package / MODEL_NAME)
    return open_model(package / MODEL_NAME)
