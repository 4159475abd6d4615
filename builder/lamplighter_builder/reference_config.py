"""The configuration with which transformers runs a checkpoint, for comparisons and calibrations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamplighter_agent.errors import BuildError
from lamplighter_builder.fields import Fields
from lamplighter_builder.models.phi3 import with_present_rope_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def reference_config(config: Fields) -> PretrainedConfig:
    """Return transformers' configuration for the fields of a ``config.json``.

    Raises:
        BuildError: If transformers does not take them.
    """
    from transformers import AutoConfig

    model_type = _reference_type(config)
    if model_type == "phi3":
        config = with_present_rope_names(config)
    # No text is padded here, and a default beyond a small vocabulary would be refused.
    fields = {**config.values, "pad_token_id": None}
    del fields["model_type"]
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # its classes raise what their checks happen to meet
        raise BuildError(
            f"{config.origin}: transformers cannot run it for a comparison: {error}",
            hint="build it with --no-fidelity, and without a calibration",
        ) from error


def _reference_type(config: Fields) -> str:
    """Return the model type that transformers takes a checkpoint for, by its rule for early configs of Ministral."""
    model_type = config.text("model_type")
    return "ministral" if model_type == "mistral" and config.has("layer_types") else model_type
