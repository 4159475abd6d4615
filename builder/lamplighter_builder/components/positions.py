"""Which row of the rotary tables each token takes, where it is not simply the token's position."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx

from lamplighter_builder.components.rope import LongRope
from lamplighter_builder.graph import Graph, Value

_INT64: Final = int(onnx.TensorProto.INT64)


def long_rope_positions(graph: Graph, rope: LongRope, positions: int, token_ids: Value, attention_mask: Value) -> Value:
    """Choose the short or the long set of LongRoPE for each row of the batch.

    A row takes the long set if it has, or is planned to have, more than ``original_context`` tokens. The plan is the
    graph input ``rope_tokens`` int64 [1] or [B], 0 by default: keys of the two sets must not mix, so whoever computes a
    long prompt in chunks gives its length with every chunk.

    Args:
        graph: Graph under construction.
        rope: Whose tables are meant.
        positions: Positions that the tables were declared for.
        token_ids: int64 [B, S].
        attention_mask: int64 [B, T], rows of ones, then zeros.

    Returns:
        int64 [B, S], rows of the tables.
    """
    plain = token_positions(graph, token_ids, attention_mask)
    if not rope.switches(positions):
        return plain
    with graph.scope("rope_positions"):
        one = graph.constant(np.array([1], dtype=np.int64))
        (row_tokens,) = graph.op("ReduceSum", [attention_mask, one], attributes={"keepdims": 1})  # [B, 1]
        planned = graph.input_with_default("rope_tokens", np.zeros(1, dtype=np.int64), ["rope_rows"])
        (planned_rows,) = graph.op("Unsqueeze", [planned, one])  # [B, 1]
        (longest,) = graph.op("Max", [row_tokens, planned_rows])
        (is_long,) = graph.op("Greater", [longest, graph.constant(np.array([rope.original_context], dtype=np.int64))])
        (is_long_int,) = graph.op("Cast", [is_long], attributes={"to": _INT64})
        first_long = graph.constant(np.array([rope.short_rows(positions)], dtype=np.int64))
        (offset,) = graph.op("Mul", [is_long_int, first_long])
        (chosen,) = graph.op("Add", [plain, offset])
        return chosen


def token_positions(graph: Graph, token_ids: Value, attention_mask: Value) -> Value:
    """Compute the position of each new token.

    Args:
        graph: Graph under construction.
        token_ids: int64 [B, S].
        attention_mask: int64 [B, T], rows of ones, then zeros.

    Returns:
        int64 [B, S].
    """
    with graph.scope("positions"):
        one = graph.constant(np.array([1], dtype=np.int64))
        (row_tokens,) = graph.op("ReduceSum", [attention_mask, one], attributes={"keepdims": 1})  # [B, 1]
        (new_tokens,) = graph.op("Shape", [token_ids], attributes={"start": 1, "end": 2})  # [1]
        (past,) = graph.op("Sub", [row_tokens, new_tokens])
        # In a ragged first prompt a row may have fewer tokens than columns.
        (start,) = graph.op("Max", [past, graph.constant(np.array([0], dtype=np.int64))])
        (count,) = graph.op("Squeeze", [new_tokens])
        scalar_one = graph.constant(np.array(1, dtype=np.int64))
        (steps,) = graph.op("Range", [graph.constant(np.array(0, dtype=np.int64)), count, scalar_one])
        (plain,) = graph.op("Add", [start, steps])
        return plain
