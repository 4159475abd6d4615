"""What a package must show on a device before that takes it into use, and the ranges of numbers in a manifest."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]


class TrialLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must measure before it takes a package into use; None asks nothing.

    Attributes:
        min_generated_tokens_per_s: Lowest decode speed.
        max_first_token_s: Longest time to the first token of a self-test prompt.
        max_load_s: Longest time until the engine is ready.
        max_peak_rss_bytes: Most memory that the engine process may have used.
    """

    min_generated_tokens_per_s: Annotated[float, Meta(gt=0)] | None = None
    max_first_token_s: Annotated[float, Meta(gt=0)] | None = None
    max_load_s: Annotated[float, Meta(gt=0)] | None = None
    max_peak_rss_bytes: Annotated[int, Meta(gt=0)] | None = None
