"""The model as onnxruntime runs it: opened against its manifest, bound to buffers that never move.

The only module of the running agent that imports onnxruntime; everything it raises becomes one of our errors here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from lamplighter_agent.engine.cache_graph import cache_scales, with_cache, writes_codes_first
from lamplighter_agent.engine.cache_spec import CacheSpec
from lamplighter_agent.engine.graph_io import GraphIO, TensorInfo, check_graph_io, read_operator_domains
from lamplighter_agent.engine.kv_cache import CacheArray
from lamplighter_agent.engine.unpacked_prompts import END, INPUTS, MANY, NOTHING, PAST, POSITIONS, prompt_graph
from lamplighter_agent.errors import EngineError, IncompatiblePackageError, PackageError
from lamplighter_agent.package.layout import MODEL_NAME, WEIGHTS_NAME
from lamplighter_agent.package.manifest import Manifest

ALLOWED_DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operator domains of onnxruntime's own CPU kernels that a decoder graph needs; no other library is ever loaded."""

SPIN_DURATION_US: Final = 200
"""Threads wait actively this long between operators: costs no speed, and an idle engine burns no core."""

_MIN_EXTERNAL_BYTES: Final = 1024
"""Smaller tensors stay in the graph file, where a mapping would waste a page each."""

_GIVE_BACK: Final = ort.RunOptions()
"""Frees what the arena holds when the run ends."""
_GIVE_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
"""Where the weights of a graph lie that is not read from a file."""

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]

# One class a status code, without a base of their own; bindings raise RuntimeError.
_ORT_ERRORS: Final = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    ort_state.EPFail,
    RuntimeError,
)


def onnxruntime_version() -> str:
    """Return the version of the runtime in use."""
    return str(ort.__version__)


def session_options(threads: int, *, arena: bool = False) -> ort.SessionOptions:
    """Return options that keep memory flat and idle cores idle.

    Args:
        threads: Compute threads, the calling one included.
        arena: Hand the large blocks of a run from operator to operator; ``_GIVE_BACK`` frees them behind it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # By itself the arena never gives memory back, and memory patterns serve fixed shapes only.
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False
    # Warnings would tell of the overridable logits_start, which is meant.
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_DURATION_US))
    return options


class EditedGraph(NamedTuple):
    """A graph to be opened instead of the package's, None for that one, and what is known of it (``ModelSession``)."""

    graph: bytes | None
    unpacks: bool = False
    writes_first: bool = True


class ModelSession:
    """An open model and its bindings.

    Args:
        model_path: ``model.onnx`` of a package whose operators were checked (``check_operators``), or the copy that
            ``save_prepacked`` made of one.
        manifest: The package's manifest, which the graph must agree with.
        threads: Compute threads.
        cache: The cache that it will be bound to; one of int8, or with windowed layers, edits the graph as it is
            loaded. None for float32 and whole contexts.
        unpack: Compute prompts on an int8 cache from unpacked keys and values, where the graph allows it.
        edited: What ``edit_graph`` made of the model for this cache; None: it is done here.

    Attributes:
        io: Which optional inputs the graph has.
        unpacks: True if prompts are computed so.
        writes_first: True if an attention step of several rows is known to write all of their keys and values before it
            reads any, or shows it if it does not (a float32 cache can be poisoned).

    Raises:
        PackageError: If onnxruntime cannot read the model or its weights.
        IncompatiblePackageError: If its interface is not the contract's, or an operator is not implemented here.
        EngineError: If memory runs out.
    """

    def __init__(
        self,
        model_path: Path,
        manifest: Manifest,
        *,
        threads: int,
        cache: CacheSpec | None = None,
        unpack: bool = False,
        edited: EditedGraph | None = None,
    ) -> None:
        cache = CacheSpec.from_model(manifest.model) if cache is None else cache
        edited = edit_graph(model_path, manifest, cache, unpack=unpack) if edited is None else edited
        # To unpack takes blocks of many pages, and to get each of them anew takes longer than to fill it.
        options = session_options(threads, arena=edited.unpacks)
        if edited.graph is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(model_path.parent))
        self.unpacks, self.writes_first = edited.unpacks, edited.writes_first
        self._runtime = _open(model_path, options, edited.graph)
        own = frozenset(INPUTS if self.unpacks else ())
        self.io: GraphIO = check_graph_io(
            inputs=[info for info in _tensor_infos(self._runtime.get_inputs()) if info.name not in own],
            overridable=_tensor_infos(self._runtime.get_overridable_initializers()),
            outputs=_tensor_infos(self._runtime.get_outputs()),
            model=manifest.model,
            cache_dtype=cache.dtype,
        )

    def bind(self, cache_rows: tuple[CacheArray, ...]) -> Binding:
        """Return a binding whose past and present are these rows of the cache (see ``KVCache.buffers``)."""
        binding = Binding(self._runtime, self.io, cache_rows)
        if self.unpacks:
            _, heads, _, head_dim = cache_rows[0].shape
            binding.prepare_pieces(heads * head_dim)
        return binding


class Binding:
    """One set of bound tensors. Arrays are shared, not copied: change them in place and run again.

    Args:
        runtime: The onnxruntime session.
        io: Its optional inputs.
        cache_rows: Contiguous float32 arrays [batch, heads, capacity, head_dim], key and value of each layer in turn.
    """

    def __init__(self, runtime: ort.InferenceSession, io: GraphIO, cache_rows: tuple[CacheArray, ...]) -> None:
        self._runtime = runtime
        self._io = io
        self._binding = runtime.io_binding()
        self._run_options: ort.RunOptions | None = None
        for index, array in enumerate(cache_rows):
            layer, kind = divmod(index, 2)
            name = f"{layer}.{'value' if kind else 'key'}"
            # The kernel works in place exactly if past and present are the same memory.
            shared = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", shared)
            self._binding.bind_ortvalue_output(f"present.{name}", shared)

    def set_inputs(self, input_ids: IntArray, attention_mask: IntArray, position_ids: IntArray) -> None:
        """Bind the inputs: int64 [batch, tokens], [batch, total tokens], [batch, tokens].

        ``position_ids`` is dropped where the graph derives positions from the mask.
        """
        self._bind_array("input_ids", input_ids)
        self._bind_array("attention_mask", attention_mask)
        if self._io.has_position_ids:
            self._bind_array("position_ids", position_ids)

    def set_rope_tokens(self, rope_tokens: IntArray) -> None:
        """Bind int64 [batch]: the planned tokens of each row (``KVCache.rope_tokens``); dropped without LongRoPE."""
        if self._io.has_rope_tokens:
            self._bind_array("rope_tokens", rope_tokens)

    def prepare_pieces(self, kv_width: int) -> None:
        """Make this binding one for decode steps, and ``set_piece`` possible: a session that ``unpacks`` needs it."""
        self._bind_array(NOTHING, np.zeros((1, 0, kv_width), dtype=np.float32))
        self.set_piece(0, 1)

    def set_piece(self, past: int, tokens: int) -> None:
        """Say of a session that ``unpacks`` which part of a prompt comes: ``tokens`` behind ``past`` of them."""
        self._run_options = _GIVE_BACK if tokens > 1 else None
        self._bind_array(MANY, np.array([tokens > 1]))
        self._bind_array(PAST, np.array([past], dtype=np.int64))
        self._bind_array(END, np.array([past + tokens], dtype=np.int64))
        self._bind_array(POSITIONS, np.arange(past, past + tokens, dtype=np.int64).reshape(1, -1))

    def set_logits(self, logits: FloatArray, *, start: int) -> None:
        """Bind the output: float32 [batch, tokens - start, vocab_size], the rows of the tokens from ``start`` on.

        A graph without ``logits_start`` needs ``start`` 0.
        """
        if self._io.has_logits_start:
            # bind_cpu_input refuses overridable initializers; bind_ortvalue_input takes them.
            self._bind_array("logits_start", np.array([start], dtype=np.int64))
        elif start != 0:
            raise ValueError("this graph has no logits_start: bind all rows")
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))

    def set_hidden_states(self, hidden: FloatArray) -> None:
        """Bind the optional output: float32 [batch, tokens, hidden_size], the last layer's, behind the final norm."""
        self._binding.bind_ortvalue_output("hidden_states", ort.OrtValue.ortvalue_from_numpy(hidden))

    def run(self) -> None:
        """Compute; the bound arrays hold the results afterwards.

        Raises:
            EngineError: If the runtime fails.
        """
        try:
            self._runtime.run_with_iobinding(self._binding, self._run_options)
        except _ORT_ERRORS as error:
            raise EngineError(f"onnxruntime failed in a step: {_first_line(error)}") from error

    def _bind_array(self, name: str, array: IntArray | FloatArray | NDArray[np.bool_]) -> None:
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def edit_graph(model_path: Path, manifest: Manifest, cache: CacheSpec, *, unpack: bool = False) -> EditedGraph:
    """Return the model's graph with this cache, to be opened from memory with the weights beside ``model_path``.

    Args:
        model_path: ``model.onnx`` of a package, or of a prepared copy.
        manifest: The package's manifest.
        cache: The cache; a float32 one of whole contexts needs no edit.
        unpack: See ``ModelSession``.

    Raises:
        PackageError: If the model cannot be read.
        IncompatiblePackageError: If it has no scales for an int8 cache, or keeps its cache otherwise.
    """
    if cache.dtype == "float32" and cache.windowed is None:
        return EditedGraph(None)
    scales = None
    if cache.dtype == "int8":
        if manifest.cache_scales is None:
            raise IncompatiblePackageError(f"{manifest.reference} has no scales for an int8 cache")
        scales = cache_scales(manifest.cache_scales, manifest.model)
    try:
        model = memoryview(model_path.read_bytes())
    except OSError as error:
        raise PackageError(f"{model_path}: cannot read the model: {error}") from error
    windowed = () if cache.windowed is None else cache.windowed.layers
    unpack = unpack and scales is not None and not windowed
    prompts = prompt_graph(model, cache.layers, cache.head_dim) if unpack else None
    edited = with_cache(model, cache.layers, scales=scales, windowed=windowed, prompts=prompts)
    return EditedGraph(edited, prompts is not None, scales is None or writes_codes_first(model))


def check_operators(model_path: Path) -> None:
    """Check that a model calls only operators of the allowed domains.

    Raises:
        PackageError: If the file cannot be read or is no ONNX model.
        IncompatiblePackageError: If the graph uses other domains, or functions of its own.
    """
    try:
        domains = read_operator_domains(model_path.read_bytes())
    except OSError as error:
        raise PackageError(f"{model_path}: cannot read the model: {error}") from error
    foreign = sorted(domains - ALLOWED_DOMAINS)
    if foreign:
        raise IncompatiblePackageError(
            f"{model_path}: the graph uses operators of {', '.join(repr(name) for name in foreign[:5])}, "
            f"but only {', '.join(repr(name) for name in sorted(ALLOWED_DOMAINS))} are allowed"
        )


def save_prepacked(model_path: Path, directory: Path, *, threads: int, edited: bytes | None = None) -> None:
    """Write a copy of a model whose weights are packed for this CPU, so that loading maps them instead of packing.

    Args:
        model_path: ``model.onnx`` of a package whose operators were checked.
        directory: Existing directory, which gets ``model.onnx`` and ``model.onnx.data``.
        threads: Compute threads.
        edited: Another graph on the same weights, to be copied instead; None: the one at ``model_path``.

    Raises:
        PackageError: If onnxruntime cannot read the model.
        IncompatiblePackageError: If an operator is not implemented here.
        EngineError: If memory runs out or the copy cannot be written.
    """
    options = session_options(threads)
    options.optimized_model_filepath = str(directory / MODEL_NAME)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", WEIGHTS_NAME),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(_MIN_EXTERNAL_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    if edited is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(model_path.parent))
    _open(model_path, options, edited)
    if not (directory / MODEL_NAME).is_file() or not (directory / WEIGHTS_NAME).is_file():
        raise EngineError(f"onnxruntime {ort.__version__} wrote no prepacked copy of {model_path} into {directory}")


def _open(model_path: Path, options: ort.SessionOptions, edited: bytes | None = None) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(edited or str(model_path), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise _load_error(model_path, error) from error


def _tensor_infos(nodes: list[ort.NodeArg]) -> list[TensorInfo]:
    return [TensorInfo(node.name, node.type, tuple(node.shape)) for node in nodes]


def _load_error(model_path: Path, error: Exception) -> PackageError | EngineError:
    reason = f"{model_path}: onnxruntime {ort.__version__} cannot load the model: {_first_line(error)}"
    if isinstance(error, (ort_state.RuntimeException, ort_state.EPFail)) and "alloc" in str(error).lower():
        return EngineError(reason, hint="the machine ran out of memory: lower the budget or free some")
    if isinstance(error, ort_state.NotImplemented):
        return IncompatiblePackageError(reason, hint="the package needs a newer onnxruntime, or another machine")
    return PackageError(reason, hint="fetch or build the package again")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:500]
