"""Graphs of one model in different formats, and how large their files will be before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from lamplighter_agent.package.layout import WEIGHTS_NAME
from lamplighter_agent.package.manifest import ModelFacts
from lamplighter_builder.checkpoint import Checkpoint
from lamplighter_builder.graph import Graph, Region
from lamplighter_builder.models.decoder import CausalLM
from lamplighter_builder.precision import choose_parts
from lamplighter_builder.quantization.scheme import Scheme
from lamplighter_builder.registry import find_architecture
from lamplighter_builder.targets import GraphTarget
from lamplighter_builder.weight_file import place


class Drafts:
    """Makes graphs of a checkpoint's architecture.

    Args:
        checkpoint: Whose configuration they follow.
        target: Where they will run.

    Raises:
        UnsupportedModelError: If the architecture is not supported.
    """

    def __init__(self, checkpoint: Checkpoint, target: GraphTarget) -> None:
        self._config, self._target = checkpoint.config, target
        self._architecture = find_architecture(checkpoint.config.text("model_type"))

    def make(self, scheme: Scheme | None) -> tuple[CausalLM, Graph]:
        """Return the model and its graph with matrices as the scheme says, floats without one.

        Raises:
            CheckpointError: If a field of the configuration is missing or of another type.
            UnsupportedModelError: If it asks for something that is not supported.
        """
        model = self._architecture.make(self._config, choose_parts(scheme, self._target))
        graph = Graph(model.config.model_type)
        model.build(graph)
        return model, graph

    def measure(self, scheme: Scheme) -> int:
        """Return the bytes of the model file and the weights file together."""
        model, graph = self.make(scheme)
        regions: dict[str, Region] = {}
        position = 0
        for weight in graph.weights:
            for spec in weight.outputs:
                region = place(position, self._target.stored(weight, spec).nbytes)
                regions[spec.name] = region
                position = region.offset + region.length
        facts = model.config.facts(count_parameters(graph))
        model_bytes: int = finish_graph(graph, regions, self._target, facts).ByteSize()
        return position + model_bytes


def finish_graph(
    graph: Graph, regions: Mapping[str, Region], target: GraphTarget, facts: ModelFacts
) -> onnx.ModelProto:
    """Return the model as its target takes it, its weights pointing into the weights file."""
    model = graph.finish(WEIGHTS_NAME, regions)
    rotary_dim = facts.head_dim if facts.rope is None else facts.rope.rotary_dim
    target.lower(model, head_dim=facts.head_dim, rotary_dim=rotary_dim)
    return model


def count_parameters(graph: Graph) -> int:
    """Count the checkpoint's weights that the graph uses, each once."""
    sources = {source.name: source.shape for weight in graph.weights for source in weight.sources}
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in sources.values())
