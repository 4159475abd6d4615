"""What ``-e`` means: in which types a graph computes and stores its weights, and how it is rewritten for the provider.

Models emit one graph, float32 and for the CPU. ``GraphTarget`` turns it into the one that the provider's kernels take:

======== ========= ============== ====================================================================================
provider precision computes in    rewritten
======== ========= ============== ====================================================================================
``cpu``  all       float32        what is stored as float16 is cast to float32 when the model is loaded: scales of
                                  quantized matrices, and for fp16 the matrices
``cuda`` not fp32  float16        no hint how to compute, biases of quantized layers added apart, opset 21
``dml``  all       float16, fp32: as for cuda, and: projections split, rotation outside of the attention
                   float32
======== ========= ============== ====================================================================================

What the kernels take is written in onnxruntime's ``docs/OperatorKernels.md`` (1.31): ``GroupQueryAttention`` for CUDA
has no float32 form, DirectML's kernels end at opset 21, and neither's ``MatMulNBits`` takes a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from lamplighter_agent.errors import BuildError
from lamplighter_agent.package.manifest import CacheDtype, ExecutionProvider
from lamplighter_builder import lowering
from lamplighter_builder.components.rope import ROTARY_STEP
from lamplighter_builder.graph import Array, TensorSpec, Weight

_GPU_OPSET: Final = 21
_GPU_IR_VERSION: Final = 10
_MATRIX_GROUPS: Final = frozenset({"embedding", "experts", "head", "linear"})


@dataclass(frozen=True, slots=True)
class GraphTarget:
    """Where a graph will run, and with which floats.

    Attributes:
        provider: The execution provider.
        half_arithmetic: True if inputs, outputs and everything between are float16.
        half_matrices: True if float matrices are stored as float16.
    """

    provider: ExecutionProvider
    half_arithmetic: bool
    half_matrices: bool

    @property
    def cache_dtype(self) -> CacheDtype:
        """Type of the KV cache, and of the logits."""
        return "float16" if self.half_arithmetic else "float32"

    @property
    def float_bytes(self) -> int:
        """Bytes of a number between two operators."""
        return 2 if self.half_arithmetic else 4

    @property
    def reads_accuracy_level(self) -> bool:
        """True if ``MatMulNBits`` has a choice of how to compute there."""
        return self.provider == "cpu"

    def stored(self, weight: Weight, spec: TensorSpec) -> TensorSpec:
        """Return how one of a weight's outputs is stored in the weights file."""
        if np.dtype(spec.dtype) != np.float32:
            return spec
        scales = weight.format is not None
        matrix = self.half_matrices and weight.group in _MATRIX_GROUPS and len(spec.shape) > 1
        if self.half_arithmetic or scales or matrix:
            return TensorSpec(spec.name, np.float16, spec.shape)
        return spec

    def store(self, array: Array, stored: TensorSpec) -> Array:
        """Return an array in its stored type.

        Raises:
            BuildError: If a value is too large for float16.
        """
        if array.dtype == stored.dtype:
            return array
        with np.errstate(over="ignore"):
            converted = array.astype(stored.dtype)
        if not np.isfinite(converted).all():
            raise BuildError(
                f"{stored.name}: holds {np.abs(array).max():.4g}, beyond the range of float16",
                hint="build for the CPU with -p fp32, int8 or int4",
            )
        return converted

    def lower(self, model: onnx.ModelProto, *, head_dim: int, rotary_dim: int) -> None:
        """Rewrite a finished graph, whose external tensors lie in the file as ``stored`` says, in place."""
        lowering.adopt_stored_types(model)
        rotates_apart = self.provider == "dml" or rotary_dim % ROTARY_STEP != 0
        if self.provider == "cpu":
            lowering.widen_half_tensors(model)
            if rotates_apart:
                lowering.unpack_attention(model, head_dim=head_dim, rotary_dim=rotary_dim)
            return
        if self.half_arithmetic:
            lowering.compute_in_half(model)
        lowering.use_contrib_norms(model)
        lowering.drop_accuracy_level(model)
        lowering.split_matmul_biases(model)
        if self.provider == "dml":
            lowering.drop_unused_norm_outputs(model)
        if rotates_apart:
            lowering.unpack_attention(model, head_dim=head_dim, rotary_dim=rotary_dim)
        lowering.set_versions(model, opset=_GPU_OPSET, ir_version=_GPU_IR_VERSION)
