"""How much one client may ask."""

from __future__ import annotations

import pytest

from lamplighter_agent.service.token_bucket import MAX_CLIENTS, TokenBuckets


def test_a_burst_and_then_a_steady_rate() -> None:
    buckets = TokenBuckets(rate_per_s=2.0, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.take("a", 0.25) == pytest.approx(0.25)
    assert buckets.take("a", 0.5) == 0.0
    assert buckets.take("a", 100.0) == 0.0


def test_clients_do_not_share_a_bucket() -> None:
    buckets = TokenBuckets(rate_per_s=1.0, burst=1)
    assert [buckets.take(client, 0.0) for client in "aab"] == [0.0, 1.0, 0.0]


def test_names_made_up_by_the_thousand_do_not_fill_the_memory_or_free_the_one_who_asks() -> None:
    buckets = TokenBuckets(rate_per_s=0.001, burst=1)
    buckets.take("a", 0.0)
    for number in range(MAX_CLIENTS - 1):
        buckets.take(f"name-{number}", 0.0)
    assert buckets.take("a", 1.0) > 0.0
    assert len(buckets) == MAX_CLIENTS
