"""Structural check of a written model: ONNX's checker with shape inference, told of onnxruntime's own norm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from onnx import checker, defs, shape_inference

from lamplighter_agent.errors import BuildError

_FLOATS: Final = ["tensor(float)", "tensor(float16)"]


def check_graph(path: Path) -> None:
    """Check a model file and that its weights lie beside it; the weights are not read.

    Raises:
        BuildError: If the model breaks a rule of ONNX or of its operators.
    """
    _register_contrib_norm()
    try:
        checker.check_model(str(path), full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise BuildError(f"{path.name}: the graph is not valid: {error}") from error


@cache
def _register_contrib_norm() -> None:
    """Tell ONNX of the one operator that onnxruntime has in ONNX's own domain and ONNX does not."""
    schema = defs.OpSchema
    single, optional = schema.FormalParameterOption.Single, schema.FormalParameterOption.Optional
    defs.register_schema(
        schema(
            "SimplifiedLayerNormalization",
            "",
            1,
            inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "T")],
            outputs=[
                schema.FormalParameter("Y", "T", param_option=single),
                schema.FormalParameter("inv_std_var", "T", param_option=optional),
            ],
            type_constraints=[("T", _FLOATS, "")],
            attributes=[
                schema.Attribute("axis", schema.AttrType.INT, "", required=False),
                schema.Attribute("epsilon", schema.AttrType.FLOAT, "", required=False),
                schema.Attribute("stash_type", schema.AttrType.INT, "", required=False),
            ],
        )
    )
