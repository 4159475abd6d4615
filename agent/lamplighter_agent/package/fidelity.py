"""What a manifest tells of a package's fidelity: how far it is from the checkpoint that it was built from."""

from __future__ import annotations

import msgspec

from lamplighter_agent.package.limits import Count, Positive


class GenerationFidelity(msgspec.Struct, frozen=True, kw_only=True):
    """How the package's greedy answers to a set of prompts compare with the reference's.

    Attributes:
        prompts: Answers compared.
        tokens: Generated tokens in all answers.
        agreement: Share of them that the reference, given the same text so far, would choose too.
        identical_answers: Answers that are the reference's throughout.
        tokens_until_difference: Mean number of tokens before the first that the reference would not choose.
        endless_loops: Answers that repeat themselves to their end where the reference would have gone on.
    """

    prompts: Positive
    tokens: Positive
    agreement: float
    identical_answers: Count
    tokens_until_difference: float
    endless_loops: Count


class AccuracyLevelFidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What it changes that ``MatMulNBits`` rounds activations to 8 bits (accuracy level 4, against level 1).

    Attributes:
        tokens: Positions compared.
        flipped: Share of them whose most likely token is another one at level 1.
        kl_mean: Mean divergence from the reference at these positions as the package runs, nats a token.
        level_1_kl_mean: The same at level 1.
    """

    tokens: Positive
    flipped: float
    kl_mean: float
    level_1_kl_mean: float


class CacheFidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What it changes that the cache holds 8-bit codes (``cache_scales``) instead of float32.

    Attributes:
        tokens: Positions compared.
        flipped: Share of them whose most likely token is another one with a float32 cache.
        kl_mean: Mean divergence from the reference at these positions with an int8 cache, nats a token.
        float32_kl_mean: The same with a float32 cache.
    """

    tokens: Positive
    flipped: float
    kl_mean: float
    float32_kl_mean: float


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """How far the package is from its reference on held-out text.

    Attributes:
        kl_mean: Mean Kullback-Leibler divergence from the reference, nats a token.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
        tokens: Positions compared.
        reference: What was compared with.
        generation: Greedy answers, if some were compared.
        accuracy_level: What rounding activations changes, if the package has a choice.
        int8_cache: What an int8 cache changes, if the package has scales for one.
    """

    kl_mean: float
    top1_agreement: float
    tokens: Positive
    reference: str
    kl_median: float | None = None
    kl_p99: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    generation: GenerationFidelity | None = None
    accuracy_level: AccuracyLevelFidelity | None = None
    int8_cache: CacheFidelity | None = None
