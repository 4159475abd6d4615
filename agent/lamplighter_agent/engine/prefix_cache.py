"""The prefix cache: keys and values of earlier prompts, so that what two prompts begin with is computed once.

A tree whose edges are runs of tokens: a system prompt that many conversations share is held once, and a further turn
of a conversation adds its own tokens only. Bytes are bounded; the run that was not used for longest goes first, from
the ends of the tree. Blocks are laid out token by token in mappings of their own: cutting a run in two copies nothing,
and forgetting one gives its memory back at once.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.kv_cache import CacheArray, KVCache

TokenArray = NDArray[np.int64]
Source = Callable[["PrefixCache", Sequence[int], int], None]


def common_prefix(first: Sequence[int] | TokenArray, second: Sequence[int] | TokenArray) -> int:
    """Return with how many equal tokens two sequences begin."""
    length = min(len(first), len(second))
    differ = np.asarray(first[:length], dtype=np.int64) != np.asarray(second[:length], dtype=np.int64)
    return int(differ.argmax()) if differ.any() else length


class _Block:
    """Keys and values of consecutive tokens: a part of an anonymous mapping, which parts may share.

    Attributes:
        rows: [tokens, 2 * layers, heads, head_dim], key and value of each layer in turn.
    """

    def __init__(self, region: mmap.mmap, begin: int, end: int, rows: CacheArray) -> None:
        self._region, self._begin, self._end = region, begin, end
        self.rows = rows

    @classmethod
    def reserve(cls, spec: CacheSpec, tokens: int) -> _Block:
        """Map memory for ``tokens`` tokens."""
        length = tokens * spec.bytes_per_token
        region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            # All of it is written at once, and a tenth as many page faults make that five times as fast.
            with contextlib.suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        rows = np.frombuffer(region, dtype=spec.dtype)
        return cls(region, 0, length, rows.reshape(tokens, 2 * spec.layers, spec.heads, spec.head_dim))

    def cut(self, tokens: int) -> tuple[_Block, _Block]:
        """Return the parts before and from a token on; they share the mapping."""
        middle = self._begin + tokens * (self._end - self._begin) // len(self.rows)
        return (
            _Block(self._region, self._begin, middle, self.rows[:tokens]),
            _Block(self._region, middle, self._end, self.rows[tokens:]),
        )

    def free(self) -> None:
        """Give back the whole pages of this part; the mapping itself goes with its last part."""
        if sys.platform != "linux":
            return
        begin = -(-self._begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = self._end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._region.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class _Run:
    """An edge of the tree: tokens that always follow those of its parent.

    Attributes:
        tokens: int64 [n].
        block: Their keys and values; None for the root.
        parent: The run before; None for the root.
        children: Runs that follow, by their first token.
        used: Tick of the last use.
        pinned: True if eviction leaves it alone.
    """

    def __init__(self, tokens: TokenArray, block: _Block | None, parent: _Run | None) -> None:
        self.tokens = tokens
        self.block = block
        self.parent = parent
        self.children: dict[int, _Run] = {}
        self.used = 0
        self.pinned = False

    @property
    def rows(self) -> CacheArray:
        """Rows of the block."""
        assert self.block is not None
        return self.block.rows

    @property
    def path(self) -> list[_Run]:
        """The runs from the first one to this one, the root left out."""
        runs: list[_Run] = []
        run = self
        while run.parent is not None:
            runs.append(run)
            run = run.parent
        return runs[::-1]


class PrefixCache:
    """A byte-bounded store of prefixes. Not thread-safe.

    Args:
        spec: Shape of the caches that it copies from and to.
        max_bytes: Most bytes that it holds; 0 switches it off.
        source: Called with the cache, tokens that are wanted, and how many of them are known elsewhere, so that it
            can add more of them.

    Attributes:
        max_bytes: The bound; see ``resize``.
        nbytes: Bytes held now.
    """

    def __init__(self, spec: CacheSpec, *, max_bytes: int, source: Source | None = None) -> None:
        self.spec = spec
        self._source = source
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._ticks = 0
        self._root = _Run(np.zeros(0, dtype=np.int64), None, None)

    def recall(self, tokens: Sequence[int], *, beyond: int = 0) -> int:
        """Ask the source for the beginning of ``tokens``, then return how many leading tokens are stored.

        Args:
            tokens: What is wanted.
            beyond: Leading tokens that the caller has already.
        """
        if self._source is not None and self.max_bytes:
            self._source(self, tokens, beyond)
        return self.match(tokens)

    def match(self, tokens: Sequence[int]) -> int:
        """Return how many leading tokens are stored."""
        return sum(length for _, length in self._walk(np.asarray(tokens, dtype=np.int64)))

    def restore(self, cache: KVCache, slot: int, tokens: Sequence[int], *, held: int = 0) -> int:
        """Make a slot hold the leading tokens that are stored, and nothing else; return how many there are.

        Args:
            cache: The cache.
            slot: Its row.
            tokens: What is wanted.
            held: Leading tokens, fewer than are stored, that the slot holds already and that need no copy.
        """
        if cache.spec.windowed is not None:
            held = 0  # more tokens may move the rows of windowed layers
        cache.trim(slot, cache.offset(slot) - held)
        wanted = np.asarray(tokens, dtype=np.int64)
        runs = list(self._walk(wanted))
        cache.advance(slot, wanted[held : sum(length for _, length in runs)].tolist())
        tick = self._tick()
        begin = 0
        for run, length in runs:
            end = begin + length
            for index in range(len(cache.buffers)) if end > held else ():
                target, first = cache.resident(index, slot, max(begin, held), end)
                target[:] = run.rows[first - begin : length, index].swapaxes(0, 1)
            run.used = tick
            begin = end
        return begin

    def store(self, cache: KVCache, slot: int, tokens: int, *, pinned: bool = False) -> int:
        """Keep the first ``tokens`` tokens of a slot, or as many of them as the bound allows.

        Tokens that windowed layers have dropped, and those behind them, are not kept: see ``store_before_loss``.

        Args:
            cache: The cache.
            slot: Its row.
            tokens: At most the slot's offset.
            pinned: Keep them until ``clear``.

        Returns:
            How many leading tokens of the slot are stored now.

        Raises:
            ValueError: If the slot holds fewer.
        """
        if tokens > cache.offset(slot):
            raise ValueError(f"slot {slot} holds {cache.offset(slot)} tokens, not {tokens}")
        held = cache.tokens(slot)[:tokens]
        if cache.spec.windowed is not None:
            stored = self.match(held)
            if stored < cache.spec.windowed.first(cache.offset(slot)):
                held = held[:stored]

        def fill(rows: CacheArray, begin: int) -> None:
            for index in range(len(cache.buffers)):
                source, _ = cache.resident(index, slot, begin, begin + len(rows))
                rows[:, index] = source.swapaxes(0, 1)

        return self.store_filled(held, fill, pinned=pinned)

    def store_before_loss(self, cache: KVCache, slot: int, coming: int, *, pinned: bool = False) -> None:
        """Keep what a prompt of a slot's tokens gave before ``coming`` more make windowed layers drop some of it.

        So the tree holds every token whole, and a text can go on from any of them.
        """
        if coming > cache.steady(slot):
            self.store(cache, slot, len(cache.prefix(slot)), pinned=pinned)

    def resize(self, max_bytes: int) -> None:
        """Change the bound; what no longer fits goes, pinned runs last."""
        self.max_bytes = max_bytes
        self._evict(max_bytes)
        if self.nbytes > max_bytes:
            self.clear()

    def clear(self) -> None:
        """Forget everything, pinned or not."""
        self._root.children.clear()
        self.nbytes = 0

    def sequences(self) -> Iterator[tuple[TokenArray, list[CacheArray]]]:
        """Yield the stored sequences, pinned first, then last used first.

        Each is int64 [n] and its rows [n, 2 * layers, heads, head_dim], cut in several parts.
        """
        leaves = [run for run in self._runs() if not run.children]
        for leaf in sorted(leaves, key=lambda run: (not run.pinned, -run.used)):
            yield np.concatenate([run.tokens for run in leaf.path]), [run.rows for run in leaf.path]

    def store_filled(
        self, tokens: Sequence[int], fill: Callable[[CacheArray, int], None], *, pinned: bool = False
    ) -> int:
        """Keep tokens whose keys and values another writes.

        Args:
            tokens: The tokens.
            fill: Gets an array [n, 2 * layers, heads, head_dim] and the index of the token that its first row is for,
                and writes it. If it raises, nothing is added.
            pinned: Keep them until ``clear``.

        Returns:
            How many leading tokens are stored now.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        tick = self._tick()
        parent, begin = self._root, 0
        for run, length in list(self._walk(wanted)):
            parent = run if length == len(run.tokens) else self._split(run, length)
            parent.used = tick
            parent.pinned = parent.pinned or pinned
            begin += length
        added = self._make_room(len(wanted) - begin, tick)
        if added > 0:
            block = _Block.reserve(self.spec, added)
            fill(block.rows, begin)
            run = _Run(wanted[begin : begin + added].copy(), block, parent)
            run.used, run.pinned = tick, pinned
            parent.children[int(run.tokens[0])] = run
            self.nbytes += added * self.spec.bytes_per_token
        return begin + added

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _walk(self, tokens: TokenArray) -> Iterator[tuple[_Run, int]]:
        """Yield the runs that ``tokens`` goes along, with how many tokens of each are met."""
        run, begin = self._root, 0
        while begin < len(tokens):
            child = run.children.get(int(tokens[begin]))
            if child is None:
                return
            length = common_prefix(child.tokens, tokens[begin:])
            yield child, length
            if length < len(child.tokens):
                return
            run, begin = child, begin + length

    @staticmethod
    def _split(run: _Run, length: int) -> _Run:
        """Cut a run in two behind ``length`` tokens; return the first part."""
        assert run.parent is not None
        assert run.block is not None
        head, tail = run.block.cut(length)
        first = _Run(run.tokens[:length], head, run.parent)
        first.used, first.pinned = run.used, run.pinned
        first.children = {int(run.tokens[length]): run}
        run.parent.children[int(first.tokens[0])] = first
        run.tokens, run.block, run.parent = run.tokens[length:], tail, first
        return first

    def _make_room(self, tokens: int, tick: int) -> int:
        """Evict for a run of ``tokens`` tokens; return how many fit. What this tick used leads there and stays."""
        per_token = self.spec.bytes_per_token
        self._evict(self.max_bytes - tokens * per_token, before=tick)
        return max(min(tokens, (self.max_bytes - self.nbytes) // per_token), 0)

    def _evict(self, max_bytes: int, *, before: int | None = None) -> None:
        """Remove ends of the tree, least recently used first, until at most ``max_bytes`` are held."""
        while self.nbytes > max(max_bytes, 0):
            ends = [
                run
                for run in self._runs()
                if not run.children and not run.pinned and (before is None or run.used < before)
            ]
            if not ends:
                return
            oldest = min(ends, key=lambda run: run.used)
            assert oldest.parent is not None
            assert oldest.block is not None
            del oldest.parent.children[int(oldest.tokens[0])]
            oldest.block.free()
            self.nbytes -= len(oldest.tokens) * self.spec.bytes_per_token

    def _runs(self) -> Iterator[_Run]:
        waiting = list(self._root.children.values())
        while waiting:
            run = waiting.pop()
            waiting += run.children.values()
            yield run
