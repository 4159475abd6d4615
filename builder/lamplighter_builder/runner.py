"""A small onnxruntime loop for the builder's own checks: logits with a growing cache, greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from lamplighter_agent.errors import BuildError
from lamplighter_agent.heap import trim_heap
from lamplighter_agent.package.manifest import CacheScales
from lamplighter_builder.cache_graph import keep_codes
from lamplighter_builder.graph import Array, FloatArray

EXACT_ACTIVATIONS: Final = 1
ROUNDED_ACTIVATIONS: Final = 4
"""Accuracy levels of ``MatMulNBits``: products with float32 activations, and with activations rounded to 8 bits."""

_ACCURACY_LEVEL: Final = "accuracy_level"

IntArray = npt.NDArray[np.int64]
_CACHE_DTYPES: Final[Mapping[str, npt.DTypeLike]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
_ORT_ERRORS: Final = (
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoSuchFile,
    ort.NotImplemented,
    ort.RuntimeException,
)


class Cache(NamedTuple):
    """Tokens seen and the arrays [B, heads, offset, head_dim] of every layer, by graph input name.

    The arrays are float32, float16 in graphs for other providers than the CPU, or int8 codes.
    """

    offset: int
    arrays: dict[str, Array]


class Runner:
    """Runs a decoder graph of the contract in ``models/decoder.py``.

    Args:
        model: The model file, its weights beside it.
        accuracy_level: How ``MatMulNBits`` computes, other than the graph says; None: as it says.
        cache_scales: Scales of an 8-bit cache; None: the cache that the graph says.
        cache_heads: Heads and features of the cache, for a graph of onnxruntime-genai, which does not say them, and
            whose windowed layers take caches of the window's length alone; None: as the graph says.

    Raises:
        BuildError: If onnxruntime cannot load the model.
    """

    def __init__(
        self,
        model: Path,
        *,
        accuracy_level: int | None = None,
        cache_scales: CacheScales | None = None,
        cache_heads: tuple[int, int] | None = None,
    ) -> None:
        self._model, self._accuracy_level, self._cache_heads = model, accuracy_level, cache_heads
        self._cache_scales = cache_scales
        self._session: onnxruntime.InferenceSession | None = None
        session = self._loaded()
        inputs = session.get_inputs()
        # Not the runtime's own descriptions: they would keep the session alive.
        self._past = [(node.name, node.shape, node.type) for node in inputs if node.name.startswith("past_key_values.")]
        self._has_positions = any(node.name == "position_ids" for node in inputs)
        self._has_logits_start = any(node.name == "logits_start" for node in session.get_overridable_initializers())
        self._outputs = [node.name for node in session.get_outputs()]
        overridable = {node.name for node in session.get_overridable_initializers()}
        self._has_rope_tokens = "rope_tokens" in overridable

    def unload(self) -> None:
        """Give the memory of the weights back; the next run loads them again."""
        self._session = None
        trim_heap()  # weights are packed into pieces that the C library keeps otherwise, all of them

    def _loaded(self) -> onnxruntime.InferenceSession:
        if self._session is not None:
            return self._session
        options = onnxruntime.SessionOptions()
        source: str | bytes = str(self._model)
        if (self._accuracy_level, self._cache_scales, self._cache_heads) != (None, None, None):
            folder = str(self._model.parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            source = _changed(self._model, self._accuracy_level, self._cache_scales)
        options.log_severity_level = 3
        # The arena would keep what the longest step needed, for as long as the session lives.
        options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _ORT_ERRORS as error:
            raise BuildError(f"{self._model}: onnxruntime cannot load it: {error}") from error
        return self._session

    def with_accuracy_level(self, accuracy_level: int) -> Runner:
        """Return the same model, loaded once more, computing otherwise.

        Raises:
            BuildError: If onnxruntime cannot load the model.
        """
        return Runner(self._model, accuracy_level=accuracy_level, cache_heads=self._cache_heads)

    def with_int8_cache(self, scales: CacheScales) -> Runner:
        """Return the same model, loaded once more, with a cache of 8-bit codes.

        Raises:
            BuildError: If onnxruntime cannot load the model.
        """
        return Runner(self._model, cache_scales=scales, cache_heads=self._cache_heads)

    def has_accuracy_level(self) -> bool:
        """Tell whether the model has products that round activations to 8 bits, and could do without."""
        graph = onnx.load(self._model, load_external_data=False).graph
        return any(_accuracy_level(node) == ROUNDED_ACTIVATIONS for node in graph.node)

    def empty_cache(self, batch_size: int = 1) -> Cache:
        """Return a cache without tokens."""
        arrays: dict[str, Array] = {}
        for name, shape, element in self._past:
            heads, head_dim = self._cache_heads or (shape[1], shape[3])
            arrays[name] = np.zeros((batch_size, heads, 0, head_dim), dtype=_CACHE_DTYPES[element])
        return Cache(0, arrays)

    def run(
        self,
        tokens: IntArray,
        cache: Cache,
        *,
        mask: IntArray | None = None,
        logits_start: int | None = None,
        rope_tokens: int = 0,
    ) -> tuple[FloatArray, Cache]:
        """Feed tokens after those in the cache.

        Args:
            tokens: int64 [B, S].
            cache: What came before.
            mask: int64 [B, offset + S]; all ones if None.
            logits_start: First position of ``tokens`` whose logits are wanted; the graph's default if None.
            rope_tokens: Tokens that the rows are planned to have, for graphs with LongRoPE.

        Returns:
            Logits float32 [B, n, V] and the cache after the tokens.

        Raises:
            BuildError: If onnxruntime cannot load or run the model.
        """
        total = cache.offset + tokens.shape[1]
        feeds: dict[str, Array] = {
            "input_ids": tokens,
            "attention_mask": np.ones((tokens.shape[0], total), dtype=np.int64) if mask is None else mask,
            **cache.arrays,
        }
        if self._has_positions:
            positions = np.arange(cache.offset, total, dtype=np.int64)
            feeds["position_ids"] = np.broadcast_to(positions, tokens.shape).copy()
        if logits_start is not None and self._has_logits_start:
            feeds["logits_start"] = np.array([logits_start], dtype=np.int64)
        if self._has_rope_tokens:
            feeds["rope_tokens"] = np.array([rope_tokens], dtype=np.int64)
        session = self._loaded()
        try:
            results = dict(zip(self._outputs, session.run(self._outputs, feeds), strict=True))
        except _ORT_ERRORS as error:
            raise BuildError(f"{self._model}: onnxruntime cannot run it: {error}") from error
        arrays = {name: results[name.replace("past_key_values", "present")] for name in cache.arrays}
        logits = results["logits"].astype(np.float32, copy=False)
        if logits_start is not None and not self._has_logits_start:
            logits = logits[:, logits_start:]
        return logits, Cache(total, arrays)

    def greedy(
        self, prompt: list[int], count: int, eos: frozenset[int] = frozenset(), *, short_rope_tokens: int | None = None
    ) -> list[GreedyToken]:
        """Return up to ``count`` most likely tokens after ``prompt``; the last one may be an end token.

        With LongRoPE a text that outgrows ``short_rope_tokens`` is computed again with the long factors.

        Raises:
            BuildError: If the model cannot be run, or its logits are not finite.
        """
        logits, cache = self.run(_row(prompt), self.empty_cache(), logits_start=len(prompt) - 1)
        found: list[GreedyToken] = []
        while True:
            found.append(self._choose(logits[0, -1]))
            if len(found) == count or found[-1].token in eos:
                return found
            if cache.offset == short_rope_tokens:
                text = prompt + [chosen.token for chosen in found]
                logits, cache = self.run(_row(text), self.empty_cache(), logits_start=len(text) - 1)
            else:
                logits, cache = self.run(_row([found[-1].token]), cache)

    def _choose(self, logits: FloatArray) -> GreedyToken:
        if not np.isfinite(logits).all():
            raise BuildError(f"{self._model}: the model gives logits that are not finite")
        second, first = np.partition(logits, -2)[-2:]
        return GreedyToken(int(logits.argmax()), float(first - second))


class GreedyToken(NamedTuple):
    """A chosen token and how far its logit is above the second best."""

    token: int
    margin: float


def keep_whole_caches(model: onnx.ModelProto) -> None:
    """Let windowed layers take a cache of any length: the agent makes it small again as it loads the graph."""
    for node in model.graph.node:
        for attribute in [one for one in node.attribute if one.name == "sliding_window_cache"]:
            node.attribute.remove(attribute)


def _changed(model: Path, accuracy_level: int | None, cache_scales: CacheScales | None) -> bytes:
    """Return a graph that takes whole caches, computes at an accuracy level and keeps codes, if these are given."""
    proto = onnx.load(model, load_external_data=False)
    keep_whole_caches(proto)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == _ACCURACY_LEVEL and accuracy_level is not None:
                attribute.i = accuracy_level
    if cache_scales is not None:
        keep_codes(proto, cache_scales)
    data: bytes = proto.SerializeToString()
    return data


def _accuracy_level(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == _ACCURACY_LEVEL), 0)


def _row(tokens: list[int]) -> IntArray:
    return np.array([tokens], dtype=np.int64)
