"""How an engine is to be loaded. Pure: the agent's main process sends this to its worker."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from lamplighter_agent.errors import ConfigError

MIN_CONTEXT_TOKENS: Final = 16
MAX_SLOTS: Final = 64
MAX_QUEUED_REQUESTS: Final = 64
MAX_PINNED_PROMPTS: Final = 64
DEFAULT_PREFIX_DISK_BYTES: Final = 64 * 1024 * 1024


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and choices; None lets the memory plan and the machine decide.

    Attributes:
        memory_budget_bytes: Most resident bytes of the engine's process; None: what the machine and its cgroup allow.
        max_context_tokens: Most tokens of one request, prompt and text together.
        slots: Requests decoded together.
        threads: Compute threads; None: one a physical core that this process may use.
        prefill_chunk_tokens: Prompt tokens computed at once; bounds how long other requests wait for a token.
        max_queued_requests: Requests waiting for a slot; more are refused as busy.
        speculation: Guess tokens of a request that decodes alone from its text so far; the tokens are the same without.
        prompt_weights: Compute prompts with weights of their own, where the prepared copy has them (they are faster)
            and the budget holds them beside everything else.
        kv_cache_dtype: ``float32`` or ``int8``; None: int8 only where float32 has no room for a good context.
        prefix_cache_bytes: Most bytes of the prefix cache; 0 switches it off; None: a share of what is free.
        prefix_disk_bytes: Most bytes of the prefixes that are kept on disk over a restart; 0 keeps none.
        pinned_prompts: System prompts that are computed when the package is loaded and stay in the prefix cache.
    """

    memory_budget_bytes: int | None = None
    max_context_tokens: int | None = None
    slots: int | None = None
    threads: int | None = None
    prefill_chunk_tokens: int = 128
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    speculation: bool = True
    prompt_weights: bool = False
    kv_cache_dtype: Literal["float32", "int8"] | None = None
    prefix_cache_bytes: int | None = None
    prefix_disk_bytes: int = DEFAULT_PREFIX_DISK_BYTES
    pinned_prompts: tuple[str, ...] = ()

    def validate(self) -> None:
        """Check every option's type and range.

        Raises:
            ConfigError: Naming the option, its value and the range.
        """
        try:
            msgspec.convert(msgspec.structs.asdict(self), type=EngineOptions)
        except msgspec.ValidationError as error:
            raise ConfigError(f"an engine option is not of its type: {error}") from error
        _check("memory_budget_bytes", self.memory_budget_bytes, 1, 2**53)
        _check("max_context_tokens", self.max_context_tokens, MIN_CONTEXT_TOKENS, 2**31 - 1)
        _check("slots", self.slots, 1, MAX_SLOTS)
        _check("threads", self.threads, 1, 256)
        _check("prefill_chunk_tokens", self.prefill_chunk_tokens, 1, 8192)
        _check("max_queued_requests", self.max_queued_requests, 1, 65536)
        _check("prefix_cache_bytes", self.prefix_cache_bytes, 0, 2**53)
        _check("prefix_disk_bytes", self.prefix_disk_bytes, 0, 2**53)
        _check("pinned_prompts (their number)", len(self.pinned_prompts), 0, MAX_PINNED_PROMPTS)


def _check(option: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"engine option {option} is {value}, but must be {low} to {high}")
