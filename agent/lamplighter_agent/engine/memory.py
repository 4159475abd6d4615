"""The memory plan: what the machine allows and what the package needs, decided before anything is loaded.

``plan_memory`` is pure; ``read_machine_memory`` is the only place that looks at the machine.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import psutil

from lamplighter_agent.engine.cache_spec import ELEMENT_BYTES, CacheSpec
from lamplighter_agent.engine.cgroup import memory_levels, quota_cores
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.windows import windowed_layers
from lamplighter_agent.errors import IncompatiblePackageError, MemoryBudgetError
from lamplighter_agent.package.manifest import CacheDtype, Manifest, ModelFacts

MIB: Final = 1024 * 1024

RUNTIME_BYTES: Final = 56 * MIB
"""Python, numpy, onnxruntime and the engine's modules, measured on x86-64 Linux."""

TOKENIZER_ENTRY_BYTES: Final = 680
"""A loaded tokenizer by entry of its vocabulary: 31 MiB were measured for 49,152, whatever its file's size."""

GUIDANCE_ENTRY_BYTES: Final = 880
"""The grammar engine by entry of the vocabulary: 39 MiB were measured for 49,152, and 2 more with grammars in use."""

LOGITS_ROWS: Final = 2
"""Copies of a row of logits that sampling holds besides the model's output."""

MIN_USEFUL_CONTEXT_TOKENS: Final = 256
GOOD_CONTEXT_TOKENS: Final = 1024
"""A float32 cache of less gives way to an int8 one."""

DEFAULT_MAX_CONTEXT_TOKENS: Final = 4096
DEFAULT_SLOTS: Final = 4
DEFAULT_PREFIX_CACHE_BYTES: Final = 256 * MIB

_PREFIX_CACHE_SHARE: Final = 4
"""The prefix cache takes this part of what is left for it and the KV cache, if nothing is configured."""

_HEADROOM_SHARE: Final = 16
_MIN_HEADROOM_BYTES: Final = 8 * MIB

_UNPACKED_ELEMENT_BYTES: Final = 24
"""For an element of keys and one of values: codes, both as float32, and what the kernel makes of them."""


class MachineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine has to give, in bytes.

    Attributes:
        available_bytes: What can be allocated without swapping, the cgroup's limits counted.
        process_bytes: What this process already holds; part of a budget, not of ``available_bytes``.
        limit_bytes: The tightest cgroup limit, or None.
        has_guidance: True if the grammar engine is installed, so that a request may load it.
    """

    available_bytes: int
    process_bytes: int
    limit_bytes: int | None = None
    has_guidance: bool = False


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine may use memory; bytes are resident bytes.

    Attributes:
        budget_bytes: The bound of everything below.
        runtime_bytes: Interpreter, libraries and tokenizer.
        weights_bytes: The model as loaded.
        scratch_bytes: What a prefill chunk and a decode step of all slots need for a moment.
        headroom_bytes: Kept free.
        prefix_cache_bytes: Most that the prefix cache may hold.
        kv_cache_dtype: Type of the KV cache's elements.
        kv_bytes_per_token: One token of one slot, all layers.
        kv_tokens: Tokens that all slots may hold together.
        max_context_tokens: Tokens that one slot may hold.
        slots: Requests decoded together.
        prefill_chunk_tokens: Prompt tokens computed at once.
        kv_window_bytes: What windowed layers hold at most, all slots together, if their buffers are smaller than the
            context (``windows``); ``kv_bytes_per_token`` is then that of the other layers. 0 if they are not.
        prompt_weights_bytes: The weights once more, as prompts are computed fastest (``prompt_copy``); 0 without.
        unpacked_bytes: One layer's keys and values as float32, for prompts on an int8 cache (``unpacked_prompts``);
            0: they are computed from the codes, which takes longer.
        guidance_bytes: Kept for the grammar engine, which the first constrained request loads; 0: such are refused.
    """

    budget_bytes: int
    runtime_bytes: int
    weights_bytes: int
    scratch_bytes: int
    headroom_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_context_tokens: int
    slots: int
    prefill_chunk_tokens: int
    prefix_cache_bytes: int = 0
    kv_cache_dtype: CacheDtype = "float32"
    kv_window_bytes: int = 0
    prompt_weights_bytes: int = 0
    unpacked_bytes: int = 0
    guidance_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of a full cache."""
        return self.kv_tokens * self.kv_bytes_per_token + self.kv_window_bytes

    @property
    def total_bytes(self) -> int:
        """Most that the engine will hold, headroom not counted."""
        weights_bytes = self.weights_bytes + self.prompt_weights_bytes
        moment = self.scratch_bytes + self.unpacked_bytes
        fixed = self.runtime_bytes + weights_bytes + moment + self.guidance_bytes
        return fixed + self.kv_bytes + self.prefix_cache_bytes


def plan_memory(manifest: Manifest, machine: MachineMemory, options: EngineOptions) -> MemoryPlan:
    """Choose slots, context and the cache's size for a package on a machine.

    The cache takes what is left of the budget, up to what the slots can use. A configured context is kept or refused,
    never cut; an automatic one shrinks to what fits.

    Raises:
        IncompatiblePackageError: If the configured cache dtype needs scales that the package does not have.
        MemoryBudgetError: If the smallest plan (one slot with the asked, or the smallest useful context) does not fit;
            the sentence gives each part in bytes.
    """
    budget = machine.available_bytes + machine.process_bytes
    if machine.limit_bytes is not None:
        # Some of what the process holds, such as shared libraries, may be charged to another group.
        budget = min(budget, machine.limit_bytes)
    if options.memory_budget_bytes is not None:
        budget = min(budget, options.memory_budget_bytes)
    headroom = max(budget // _HEADROOM_SHARE, _MIN_HEADROOM_BYTES)
    slots = options.slots or DEFAULT_SLOTS
    model = manifest.model
    wanted = min(options.max_context_tokens or DEFAULT_MAX_CONTEXT_TOKENS, model.max_position_embeddings)
    smallest = wanted if options.max_context_tokens is not None else min(MIN_USEFUL_CONTEXT_TOKENS, wanted)
    chunk = min(options.prefill_chunk_tokens, wanted)
    scratch = _scratch_bytes(manifest, chunk, slots)
    runtime = RUNTIME_BYTES + TOKENIZER_ENTRY_BYTES * model.vocab_size
    free = budget - (runtime + manifest.memory.weights_bytes + scratch + headroom)
    guidance = GUIDANCE_ENTRY_BYTES * model.vocab_size if machine.has_guidance else 0
    cache = _choose_cache(manifest, options, free - guidance, smallest=smallest, wanted=wanted)
    if guidance and cache.tokens < max(smallest, min(GOOD_CONTEXT_TOKENS, wanted)):
        # Answers come before answers of a given form.
        guidance = 0
        cache = _choose_cache(manifest, options, free, smallest=smallest, wanted=wanted)
    if cache.windowed_slots is not None and model.sliding_window is not None:
        slots, chunk = cache.windowed_slots, min(chunk, model.sliding_window)
    if cache.tokens < smallest:
        needed = smallest * cache.bytes_per_token + cache.window_bytes + cache.prefix_bytes
        raise _does_not_fit(manifest, machine, budget=budget, parts=(runtime, scratch, headroom), needed=needed)
    context = min(wanted, cache.tokens)
    if options.slots is None and cache.windowed_slots is None:
        slots = max(1, min(slots, cache.tokens // min(MIN_USEFUL_CONTEXT_TOKENS, context)))
    plan = MemoryPlan(
        budget_bytes=budget,
        runtime_bytes=runtime,
        weights_bytes=manifest.memory.weights_bytes,
        scratch_bytes=scratch,
        headroom_bytes=headroom,
        kv_cache_dtype=cache.dtype,
        kv_bytes_per_token=cache.bytes_per_token,
        kv_tokens=min(cache.tokens, slots * context),
        max_context_tokens=context,
        slots=slots,
        prefill_chunk_tokens=chunk,
        prefix_cache_bytes=cache.prefix_bytes,
        kv_window_bytes=cache.window_bytes,
        guidance_bytes=guidance,
    )
    return _with_unpacked_prompts(plan, model)


def with_prompt_weights(plan: MemoryPlan, weights_bytes: int) -> MemoryPlan:
    """Return the plan with weights for prompts beside those for decoding, if the budget holds them as well.

    They take nothing away from the caches: a longer context is worth more than a faster prompt.
    """
    if plan.total_bytes + plan.headroom_bytes + weights_bytes > plan.budget_bytes:
        return plan
    return msgspec.structs.replace(plan, prompt_weights_bytes=weights_bytes)


def read_machine_memory(root: Path = Path("/")) -> MachineMemory:
    """Read MemAvailable and the cgroup's limits (v2 and v1, every level up to the root).

    Args:
        root: Where ``proc`` and ``sys`` are mounted; a test gives a directory of its own.
    """
    available = psutil.virtual_memory().available
    limit: int | None = None
    for level in memory_levels(root):
        limit = level.limit_bytes if limit is None else min(limit, level.limit_bytes)
        available = min(available, level.free_bytes)
    return MachineMemory(
        available_bytes=available,
        process_bytes=psutil.Process(os.getpid()).memory_info().rss,
        limit_bytes=limit,
        has_guidance=importlib.util.find_spec("llguidance") is not None,
    )


def physical_cores() -> int:
    """Return the physical cores that this process may use: affinity and the cgroup's CPU quota counted."""
    logical = len(os.sched_getaffinity(0))
    physical = psutil.cpu_count(logical=False) or logical
    total = psutil.cpu_count(logical=True) or logical
    siblings = max(total // physical, 1)
    return max(1, min(-(-logical // siblings), quota_cores(Path("/")) or logical))


class _Cache(NamedTuple):
    """A KV cache that a plan could have, and the prefix cache beside it.

    ``windowed_slots`` are those that have ``window_bytes`` together; None without small buffers for windowed layers.
    """

    dtype: CacheDtype
    bytes_per_token: int
    tokens: int
    prefix_bytes: int
    window_bytes: int = 0
    windowed_slots: int | None = None


def _choose_cache(manifest: Manifest, options: EngineOptions, free: int, *, smallest: int, wanted: int) -> _Cache:
    """Return the float32 cache if ``free`` bytes give it a good context, else the int8 one where it holds more.

    int8 is not as exact, so it is no default.
    """
    dtypes: tuple[CacheDtype, ...] = ("float32",) if manifest.cache_scales is None else ("float32", "int8")
    if options.kv_cache_dtype is not None:
        if options.kv_cache_dtype not in dtypes:
            raise IncompatiblePackageError(
                f"{manifest.reference} has no scales for an int8 cache", hint="build the package anew, or use float32"
            )
        dtypes = (options.kv_cache_dtype,)
    model = manifest.model
    good = smallest if options.max_context_tokens is not None else min(GOOD_CONTEXT_TOKENS, wanted)
    found = []
    for dtype in dtypes:
        layer_bytes = 2 * model.num_key_value_heads * model.head_dim * ELEMENT_BYTES[dtype]
        per_token = model.num_hidden_layers * layer_bytes
        prefixes = _prefix_cache_bytes(options, free, smallest * per_token)
        whole = _Cache(dtype, per_token, (free - prefixes) // per_token, prefixes)
        found.append(_windowed_cache(whole, model, options, free, layer_bytes=layer_bytes, wanted=wanted) or whole)
        if found[-1].tokens >= good:
            return found[-1]
    return found[-1]


def _windowed_cache(
    whole: _Cache, model: ModelFacts, options: EngineOptions, free: int, *, layer_bytes: int, wanted: int
) -> _Cache | None:
    """Return the same cache with small buffers for windowed layers; None where that would not hold more tokens.

    Fewer slots than usual are taken where the windows of all would leave too little for the other layers.
    """
    windowed = CacheSpec.from_model(model, whole.dtype, windowed_layers(model, wanted)).windowed
    if windowed is None:
        return None
    window_bytes = len(windowed.layers) * windowed.capacity * layer_bytes
    per_token = whole.bytes_per_token - len(windowed.layers) * layer_bytes
    for slots in (options.slots,) if options.slots is not None else range(DEFAULT_SLOTS, 0, -1):
        left = free - whole.prefix_bytes - slots * window_bytes
        tokens = max(left // per_token, 0) if per_token else slots * wanted if left >= 0 else 0
        context = min(tokens, wanted)
        longer = context > windowed.capacity and context >= min(whole.tokens, wanted)
        if longer and tokens >= min(whole.tokens, slots * wanted):
            return _Cache(whole.dtype, per_token, tokens, whole.prefix_bytes, slots * window_bytes, slots)
    return None


def _with_unpacked_prompts(plan: MemoryPlan, model: ModelFacts) -> MemoryPlan:
    """Return the plan with room to unpack a layer of an int8 cache for prompts, if the budget holds that as well."""
    if plan.kv_cache_dtype != "int8" or plan.kv_window_bytes:
        return plan
    elements = model.num_key_value_heads * model.head_dim * plan.max_context_tokens
    unpacked = elements * _UNPACKED_ELEMENT_BYTES
    if plan.total_bytes + plan.headroom_bytes + unpacked > plan.budget_bytes:
        return plan
    return msgspec.structs.replace(plan, unpacked_bytes=unpacked)


def _prefix_cache_bytes(options: EngineOptions, free: int, kv_bytes: int) -> int:
    """Return the configured bound, or a share of the ``free`` bytes that leaves the smallest KV cache whole."""
    if options.prefix_cache_bytes is not None:
        return options.prefix_cache_bytes
    return max(min(free // _PREFIX_CACHE_SHARE, free - kv_bytes, DEFAULT_PREFIX_CACHE_BYTES), 0)


def _scratch_bytes(manifest: Manifest, chunk: int, slots: int) -> int:
    """Scale the builder's figure to our chunk, and add rows of logits for each slot and the sampler."""
    needs = manifest.memory
    prefill = -(-needs.prefill_scratch_bytes * chunk // needs.prefill_chunk_tokens)
    return prefill + (slots + LOGITS_ROWS) * manifest.model.vocab_size * 4


def _does_not_fit(
    manifest: Manifest, machine: MachineMemory, *, budget: int, parts: tuple[int, int, int], needed: int
) -> MemoryBudgetError:
    weights = manifest.memory.weights_bytes
    runtime, scratch, headroom = parts
    limit = "" if machine.limit_bytes is None else f", cgroup limit {machine.limit_bytes}"
    return MemoryBudgetError(
        f"{manifest.reference} needs at least {sum(parts) + weights + needed} bytes (runtime {runtime}, "
        f"weights {weights}, scratch {scratch}, headroom {headroom}, KV cache {needed}), but the budget is {budget} "
        f"(available {machine.available_bytes}, held by this process {machine.process_bytes}{limit})",
        hint="raise the memory budget, lower max_context_tokens, or use a smaller package",
    )
