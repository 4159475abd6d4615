"""Which tokens may be drawn, and the draw: pure functions on float32 logits of shape [vocab_size].

Only the tokens that can still be drawn are exponentiated or sorted: a vocabulary of 256,000 stays cheap on a small CPU.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.events import TokenLogprob

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]

_GROUP: Final = 64
_FIRST_GUESS: Final = 512
_MORE: Final = 8
_BINS: Final = 4096
_BINS_PER_NAT: Final = 128


class Candidates(NamedTuple):
    """Tokens that may still be drawn, most likely first: ``ids`` int64 [n], ``logits`` float32 [n]."""

    ids: TokenIds
    logits: Logits


def top_candidates(logits: Logits, count: int) -> Candidates:
    """Return the ``count`` largest logits, largest first; equal logits in the order of their ids.

    The ``count``-th largest of the group maxima bounds the answer from below, and only groups that reach it are looked
    into: one pass over the vocabulary, whatever its size.
    """
    size, groups = logits.size, logits.size // _GROUP
    if count >= size:
        ids: TokenIds = np.arange(size, dtype=np.int64)
    elif count > groups // 4:
        ids = np.flatnonzero(logits >= np.partition(logits, size - count)[size - count])
    else:
        grouped = logits[: groups * _GROUP].reshape(_GROUP, groups)
        maxima = grouped.max(axis=0)
        bound = np.partition(maxima, groups - count)[groups - count]
        columns = np.flatnonzero(maxima >= bound)
        rows, chosen = np.nonzero(grouped[:, columns] >= bound)
        tail = groups * _GROUP + np.flatnonzero(logits[groups * _GROUP :] >= bound)
        # Rows come in order, columns within a row too, so ids ascend.
        ids = np.concatenate((rows * groups + columns[chosen], tail))
    values = logits[ids]
    order = np.argsort(-values, kind="stable")[:count]
    return Candidates(ids[order], values[order])


def keep_top_p(logits: Logits, top_p: float) -> Candidates:
    """Return the fewest most likely tokens whose probabilities reach ``top_p``; at least one."""
    total = float(np.exp(logits - logits.max()).sum(dtype=np.float64))
    count = _FIRST_GUESS
    while True:
        found = top_candidates(logits, min(count, logits.size))
        reached = np.cumsum(np.exp(found.logits - found.logits[0]), dtype=np.float64)
        if reached[-1] >= top_p * total or found.ids.size == logits.size:
            return _cut(found, int(np.searchsorted(reached, top_p * total)) + 1)
        count *= _MORE


def cut_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Return the leading candidates whose probabilities among the candidates reach ``top_p``; at least one."""
    reached = np.cumsum(np.exp(candidates.logits - candidates.logits[0]), dtype=np.float64)
    return _cut(candidates, int(np.searchsorted(reached, top_p * reached[-1])) + 1)


def cut_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Return the candidates at least ``min_p`` times as likely as the first."""
    bound = candidates.logits[0] + np.log(min_p)
    return _cut(candidates, int(np.count_nonzero(candidates.logits >= bound)))


def keep_typical(logits: Logits, typical_p: float) -> Candidates:
    """Return the tokens whose information is closest to the distribution's entropy, up to the mass ``typical_p``.

    Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): tokens are taken in the order of
    ``|-log p - entropy|`` until their probabilities reach ``typical_p``; those as close as the last one stay too.
    The mass is summed up in bins of that distance, and only the bin in which it is reached is sorted. Tokens come in
    the order of their ids.
    """
    # A token of weight zero, which was banned, would give 0 * inf.
    shifted = np.maximum(logits - logits.max(), np.float32(-1e30))
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    entropy = math.log(total) - float(np.dot(weights, shifted)) / total
    distance = np.abs(np.float32(math.log(total) - entropy) - shifted)
    bins = np.minimum(distance * np.float32(_BINS_PER_NAT), np.float32(_BINS - 1)).astype(np.int64)
    reached = np.cumsum(np.bincount(bins, weights=weights, minlength=_BINS))
    last = min(int(np.searchsorted(reached, typical_p * total)), _BINS - 1)
    inside = np.flatnonzero((bins == last) & (weights > 0))
    before = float(reached[last - 1]) if last else 0.0
    bound = np.float32((last + 1) / _BINS_PER_NAT)
    if inside.size:
        order = inside[np.argsort(distance[inside], kind="stable")]
        count = int(np.searchsorted(before + np.cumsum(weights[order], dtype=np.float64), typical_p * total))
        bound = distance[order[min(count, order.size - 1)]]
    ids = np.flatnonzero((distance <= bound) & (weights > 0))
    return Candidates(ids, logits[ids])


def cut_typical(candidates: Candidates, typical_p: float) -> Candidates:
    """Return the candidates that are typical among the candidates (see ``keep_typical``), in their order."""
    kept = keep_typical(candidates.logits, typical_p)
    return Candidates(candidates.ids[kept.ids], kept.logits)


def keep_min_p(logits: Logits, min_p: float) -> Candidates:
    """Return the tokens at least ``min_p`` times as likely as the most likely one, in the order of their ids."""
    ids = np.flatnonzero(logits >= logits.max() + np.log(min_p))
    return Candidates(ids, logits[ids])


def exclude_top_choices(candidates: Candidates, threshold: float) -> Candidates:
    """Return the candidates without those of at least the probability ``threshold``, the least likely of them kept.

    XTC, exclude top choices (oobabooga/text-generation-webui pull request 6335): probabilities are those among the
    candidates, which may have any order; with fewer than two at the threshold nothing changes.
    """
    weights = np.exp(candidates.logits - candidates.logits.max())
    likely = np.flatnonzero(weights >= threshold * float(weights.sum(dtype=np.float64)))
    if likely.size < 2:
        return candidates
    # Of equal ones the last is kept, so that exactly one stays.
    stays = likely[::-1][int(candidates.logits[likely][::-1].argmin())]
    kept = np.ones(candidates.ids.size, dtype=np.bool_)
    kept[likely] = False
    kept[stays] = True
    return Candidates(candidates.ids[kept], candidates.logits[kept])


def draw(logits: Logits, uniform: float) -> int:
    """Return the index that ``uniform`` in [0, 1) falls on in the distribution softmax(``logits``).

    Group by group first, then inside the group: no running sum over a large vocabulary.
    """
    weights = np.exp(logits - logits.max())
    starts = np.arange(0, weights.size, _GROUP)
    group, rest = _locate(np.add.reduceat(weights, starts), uniform)
    begin = int(starts[group])
    inside, _ = _locate(weights[begin : begin + _GROUP], rest)
    return begin + inside


def _locate(weights: Logits, share: float) -> tuple[int, float]:
    """Return the index at which the running sum passes ``share`` of the total, and the share of that index passed."""
    reached = np.cumsum(weights, dtype=np.float64)
    # Rounding may lift the product to the total itself, which would fall behind the last weight.
    point = min(share * reached[-1], np.nextafter(reached[-1], 0.0))
    index = int(np.searchsorted(reached, point, side="right"))
    before = reached[index - 1] if index else 0.0
    return index, float((point - before) / (reached[index] - before))


def log_probability(logits: Logits, token_id: int, top: int) -> TokenLogprob:
    """Return the log-probability of ``token_id`` and of the ``top`` most likely tokens under softmax(``logits``)."""
    highest = float(logits.max())
    log_total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = top_candidates(logits, top) if top else Candidates(np.empty(0, np.int64), np.empty(0, np.float32))
    alternatives = tuple(
        (other, value - log_total) for other, value in zip(best.ids.tolist(), best.logits.tolist(), strict=True)
    )
    return TokenLogprob(token_id, float(logits[token_id]) - log_total, alternatives)


def _cut(candidates: Candidates, count: int) -> Candidates:
    return Candidates(candidates.ids[:count], candidates.logits[:count])
