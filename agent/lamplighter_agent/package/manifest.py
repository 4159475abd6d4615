"""The manifest: what a package holds, needs and promises. Normative text: ``agent/PACKAGE_FORMAT.md``.

A manifest comes from outside. ``decode_manifest`` checks types with msgspec and then every rule that a type cannot
express, so that code behind it may trust names, sizes and digests. Unknown fields are ignored here and stay in the
bytes, which are stored and signed as they came; an unknown major version of the format is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from lamplighter_agent.errors import ManifestError
from lamplighter_agent.package.chat_format import ChatFormat
from lamplighter_agent.package.fidelity import Fidelity
from lamplighter_agent.package.layout import (
    CHUNK_BYTES,
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
)
from lamplighter_agent.package.limits import Count, Positive, TrialLimits
from lamplighter_agent.package.manifest_rules import check_manifest

FORMAT_VERSION: Final = "1.0"
_FORMAT_MAJOR: Final = 1

UNKNOWN_LICENCE: Final = "LicenseRef-Unknown"
"""``Manifest.licence`` of a package whose licence nobody named; who passes the package on must find out."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
FileRole = Literal["model", "weights", "tokenizer", "genai_config", "notice", "other"]
CacheDtype = Literal["float32", "float16", "int8"]
ExecutionProvider = Literal["cpu", "cuda", "dml"]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the package.

    Attributes:
        name: File name inside the package directory.
        role: What the file is for.
        length: Size in bytes.
        sha256: Digest of the whole file, lower-case hex.
        chunk_bytes: Bytes covered by each entry of ``chunk_sha256``; the last chunk may be shorter.
        chunk_sha256: Digest of each chunk in order; exactly ``ceil(length / chunk_bytes)`` of them.
    """

    name: str
    role: FileRole
    length: Count
    sha256: str
    chunk_bytes: Positive = CHUNK_BYTES
    chunk_sha256: tuple[str, ...] = ()


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become angles: enough to re-rotate cached keys, in Hugging Face's words.

    Attributes:
        rope_type: ``default``, ``linear``, ``llama3``, ``longrope``, ``yarn`` or ``dynamic``.
        rope_theta: Base of the angles.
        rotary_dim: Leading features of a head that are rotated.
        interleaved: True where pairs are neighbours, False where they are ``rotary_dim / 2`` apart.
        shiftable: True if rotating a cached key by a position difference is exact, so that a cache may slide.
        inv_freq: Radians a position of each pair of features, scaling included; None: those of ``default`` without
            scaling, and unknown for every other type.
        original_max_position_embeddings: With ``longrope``: longer texts use the long factors (see the graph input
            ``rope_tokens``), and keys cached with one set of factors are of no use with the other. Else None.
    """

    rope_type: str
    rope_theta: float
    rotary_dim: Positive
    interleaved: bool = False
    shiftable: bool = True
    inv_freq: tuple[float, ...] | None = None
    original_max_position_embeddings: Positive | None = None


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The model in Hugging Face's words (see its ``config.json``).

    Attributes:
        rope: How positions become angles.
        local_rope: The same for the windowed layers, if it differs.
        sliding_window: Tokens that a windowed layer sees, or None.
        sliding_layers: Indices of the layers that use ``sliding_window``; all of them if None and a window is set.
        unrotated_layers: Indices of the layers whose keys are not rotated, whatever ``rope`` says.
        parameters: Number of weights, tied ones counted once.
    """

    model_type: str
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    max_position_embeddings: Positive
    rope: RopeScaling | None = None
    local_rope: RopeScaling | None = None
    sliding_window: Positive | None = None
    sliding_layers: tuple[Count, ...] | None = None
    unrotated_layers: tuple[Count, ...] = ()
    tie_word_embeddings: bool = False
    parameters: Count = 0


class TensorGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Precision of a group of tensors, in ONNX's words.

    Attributes:
        name: ``embedding``, ``head``, ``linear``, ``norm``, or a narrower group.
        dtype: ``float32``, ``float16``, or ``uint4``/``int4``/``int8``/``uint8`` for quantized ones.
        bits: Bits a weight.
        block_size: Weights that share a scale, or None where not quantized.
        symmetric: True without zero points.
        accuracy_level: ``MatMulNBits``'s attribute, or None.
        length_bytes: Bytes of the group in the weights file.
    """

    name: str
    dtype: str
    bits: Positive
    block_size: Positive | None = None
    symmetric: bool = True
    accuracy_level: Count | None = None
    length_bytes: Count = 0


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """``name`` is the build's ``-p``; the groups say what that meant for each kind of tensor."""

    name: Literal["int4", "int8", "fp16", "fp32"]
    groups: tuple[TensorGroup, ...] = ()


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must have.

    Attributes:
        execution_provider: The onnxruntime provider that the graph is written for.
        min_onnxruntime: Lowest onnxruntime version, ``major.minor``.
        below_onnxruntime: The first onnxruntime version that is known not to run it, or None.
        min_agent: Lowest agent version.
        architectures: Processors that it runs on, as ``uname -m`` names them; empty: any.
        cpu_features: What the processor must have, in the words of ``/proc/cpuinfo``, for example ``avx2``.
        operator_domains: Every operator domain in the graph and its opset version.
    """

    execution_provider: ExecutionProvider = "cpu"
    min_onnxruntime: str = "1.31"
    below_onnxruntime: str | None = None
    min_agent: str = "0.1.0"
    architectures: Annotated[tuple[str, ...], Meta(max_length=16)] = ()
    cpu_features: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    operator_domains: dict[str, Positive] = msgspec.field(default_factory=dict)


class MemoryNeeds(msgspec.Struct, frozen=True, kw_only=True):
    """What running the package costs, measured or computed by the builder.

    Attributes:
        weights_bytes: Bytes resident for the weights as loaded from the package (packed copies included).
        kv_bytes_per_token: Cache bytes for one token of one slot, all layers, by cache dtype.
        prefill_scratch_bytes: Scratch for a prefill chunk of ``prefill_chunk_tokens`` tokens.
        prefill_chunk_tokens: The chunk that ``prefill_scratch_bytes`` was computed for.
    """

    weights_bytes: Count
    kv_bytes_per_token: dict[CacheDtype, Count]
    prefill_scratch_bytes: Count
    prefill_chunk_tokens: Positive = 512


class CacheScales(msgspec.Struct, frozen=True, kw_only=True):
    """Scales of an int8 cache, one a channel: a stored code times its scale is the value.

    Attributes:
        key: For each layer, float32 little-endian [num_key_value_heads, head_dim] in base64.
        value: The same for values.
    """

    key: tuple[bytes, ...]
    value: tuple[bytes, ...]


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids and sampling defaults that belong to the model (Hugging Face's ``generation_config.json``)."""

    eos_token_ids: tuple[TokenId, ...]
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    add_bos_token: bool = False
    do_sample: bool = False
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    typical_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and the greedy tokens that the builder saw from this package.

    Attributes:
        prompt_tokens: Token ids fed to the model.
        expected_tokens: Greedy continuation on the builder's machine.
        min_matching_tokens: Leading tokens that must agree on the device; fewer than all, since kernels differ
            between CPUs and a near-tie may fall the other way.
    """

    prompt_tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1)]
    expected_tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1)]
    min_matching_tokens: Count


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the package came from: source files by name with their sha256, and tools by name with their version."""

    source: str
    source_sha256: dict[str, str] = msgspec.field(default_factory=dict)
    tools: dict[str, str] = msgspec.field(default_factory=dict)
    options: dict[str, str | int | float | bool | None] = msgspec.field(default_factory=dict)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an agent must know before it fetches or loads a package."""

    format_version: str
    name: str
    version: str
    licence: str
    description: str = ""
    model: ModelFacts
    precision: Precision
    target: Target
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1, max_length=MAX_FILES)]
    memory: MemoryNeeds
    cache_scales: CacheScales | None = None
    generation: GenerationDefaults
    chat_format: ChatFormat | None = None
    self_tests: tuple[SelfTest, ...] = ()
    trial_limits: TrialLimits = TrialLimits()
    fidelity: Fidelity | None = None
    provenance: Provenance

    @property
    def reference(self) -> str:
        """``name/version``, as it is written in topics, paths and messages."""
        return f"{self.name}/{self.version}"

    @property
    def total_bytes(self) -> int:
        """Sum of the lengths of all files."""
        return sum(entry.length for entry in self.files)

    def file(self, role: FileRole) -> FileEntry:
        """Return the one file with a role that occurs once (model, weights, tokenizer, genai_config).

        Raises:
            ManifestError: If there is none.
        """
        for entry in self.files:
            if entry.role == role:
                return entry
        raise ManifestError(f"package {self.reference} lists no file with the role {role!r}")


_DECODER = msgspec.json.Decoder(Manifest)


def decode_manifest(data: bytes, *, origin: str = MANIFEST_NAME) -> Manifest:
    """Parse and check a manifest.

    Args:
        data: UTF-8 JSON.
        origin: Where it came from, for the error message.

    Raises:
        ManifestError: If it is too large, not JSON, of an unknown major version, or breaks any rule of the format.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{origin}: {len(data)} bytes, but a manifest may have at most {MAX_MANIFEST_BYTES}")
    try:
        version = msgspec.json.decode(data, type=_VersionOnly).format_version
        _check_format_version(version, origin)
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{origin}: {error}") from error
    try:
        check_manifest(manifest)
    except ManifestError as error:
        raise ManifestError(f"{origin}: {error.message}", hint=error.hint) from error
    return manifest


def read_manifest_bytes(package: Path) -> bytes:
    """Return the bytes of a package directory's manifest, unchecked but for their number.

    Raises:
        ManifestError: If it cannot be read or is too large; the message names the path.
    """
    path = package / MANIFEST_NAME
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}", hint="name a package directory") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: larger than the {MAX_MANIFEST_BYTES} bytes that a manifest may have")
    return data


def read_manifest(package: Path) -> Manifest:
    """Read and check the manifest of a package directory.

    Raises:
        ManifestError: If it cannot be read or breaks a rule; the message names the path.
    """
    return decode_manifest(read_manifest_bytes(package), origin=str(package / MANIFEST_NAME))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as indented UTF-8 JSON with a final newline; equal manifests give equal bytes.

    Raises:
        ManifestError: If the manifest breaks a rule of the format.
    """
    check_manifest(manifest)
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def manifest_schema() -> bytes:
    """Return the JSON Schema of the manifest, as shipped beside ``PACKAGE_FORMAT.md``."""
    schema = msgspec.json.schema(Manifest)
    return msgspec.json.format(msgspec.json.encode(schema, order="sorted"), indent=1) + b"\n"


class _VersionOnly(msgspec.Struct):
    format_version: str


def _check_format_version(version: str, origin: str) -> None:
    major, dot, minor = version.partition(".")
    if not (dot and major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise ManifestError(f"{origin}: format_version {version[:40]!r} is not 'major.minor'")
    if int(major) != _FORMAT_MAJOR:
        raise ManifestError(
            f"{origin}: format version {version}, but this agent understands {_FORMAT_MAJOR}.x",
            hint="update the agent, or build the package with a matching builder",
        )
