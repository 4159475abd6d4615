from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from lamplighter_agent.engine.cache_graph import cache_scales, with_cache
from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.engine.params import GenerationParams
from lamplighter_agent.engine.prepare import prepare
from lamplighter_agent.errors import IncompatiblePackageError, PackageError
from lamplighter_agent.package.layout import MANIFEST_NAME, MODEL_NAME
from lamplighter_agent.package.manifest import encode_manifest, read_manifest

OPTIONS = EngineOptions(max_context_tokens=128, slots=2, threads=2, prefill_chunk_tokens=16)
INT8 = msgspec.structs.replace(OPTIONS, kv_cache_dtype="int8")
GREEDY = GenerationParams(max_tokens=20, temperature=0.0, ignore_eos=True)
PROMPT = list(range(3, 60))


def tokens(engine: Engine, prompt: list[int], params: GenerationParams = GREEDY) -> list[int | None]:
    return [token.token_id for token in engine.generate(prompt, params)]


def test_only_the_cache_of_the_graph_changes(tiny_package: Path) -> None:
    manifest = read_manifest(tiny_package)
    assert manifest.cache_scales is not None
    scales = cache_scales(manifest.cache_scales, manifest.model)
    before = onnx.load(tiny_package / MODEL_NAME, load_external_data=False)
    after = onnx.load_from_string(with_cache(memoryview((tiny_package / MODEL_NAME).read_bytes()), 2, scales=scales))
    for old, new in zip(
        [*before.graph.input, *before.graph.output], [*after.graph.input, *after.graph.output], strict=True
    ):
        cached = old.name.startswith(("past_key_values.", "present."))
        wanted = onnx.TensorProto.INT8 if cached else old.type.tensor_type.elem_type
        assert new.type.tensor_type.elem_type == wanted
        assert (new.name, new.type.tensor_type.shape) == (old.name, old.type.tensor_type.shape)
    attention = [node for node in after.graph.node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[12:14]) for node in attention] == [
        [f"kv_scale.{layer}.key", f"kv_scale.{layer}.value"] for layer in range(2)
    ]
    stored = {
        item.name: onnx.numpy_helper.to_array(item) for item in after.graph.initializer if "kv_scale" in item.name
    }
    for layer, (key, value) in enumerate(scales):
        np.testing.assert_array_equal(stored[f"kv_scale.{layer}.key"], key.ravel())
        np.testing.assert_array_equal(stored[f"kv_scale.{layer}.value"], value.ravel())
    others = [node for node in after.graph.node if node.op_type != "GroupQueryAttention"]
    assert others == [node for node in before.graph.node if node.op_type != "GroupQueryAttention"]


def test_keys_and_values_are_those_of_float32_within_a_step_of_their_scale(tiny_package: Path) -> None:
    exact, coded = (Engine.load(tiny_package, options=options) for options in (OPTIONS, INT8))
    assert (exact.plan.kv_cache_dtype, coded.plan.kv_cache_dtype) == ("float32", "int8")
    assert exact.manifest.cache_scales is not None
    scales = cache_scales(exact.manifest.cache_scales, exact.manifest.model)
    for engine in (exact, coded):
        engine.runner.prefill(0, PROMPT)
    # The first layer sees the same input in both; a step is what rounding may cost where nothing is clipped.
    for kind in (0, 1):
        values = exact.runner.cache.buffers[kind][0, :, : len(PROMPT)]
        codes = coded.runner.cache.buffers[kind][0, :, : len(PROMPT)]
        assert codes.dtype == np.int8
        scale = scales[0][kind][:, None, :]
        inside = np.abs(values) < 127 * scale
        assert inside.mean() > 0.98
        assert (np.abs(values - codes * scale) <= 0.501 * scale)[inside].all()


def test_an_int8_cache_takes_a_quarter_and_still_answers(tiny_package: Path, tmp_path: Path) -> None:
    exact, coded = (Engine.load(tiny_package, options=options) for options in (OPTIONS, INT8))
    assert coded.plan.kv_bytes_per_token * 4 == exact.plan.kv_bytes_per_token
    answer = tokens(coded, PROMPT)
    assert len(answer) == 21
    prepare(tiny_package, tmp_path)
    mapped = Engine.load(tiny_package, options=INT8, prepared_root=tmp_path)
    assert mapped.prepared
    assert tokens(mapped, PROMPT) == answer


def test_prefix_cache_and_sliding_work_in_int8(tiny_package: Path) -> None:
    engine = Engine.load(tiny_package, options=INT8)
    cold = tokens(engine, PROMPT, msgspec.structs.replace(GREEDY, cache_prompt=False))
    tokens(engine, PROMPT)
    assert tokens(engine, PROMPT) == cold
    params = msgspec.structs.replace(GREEDY, max_tokens=300, on_context_full="slide")
    assert len(tokens(engine, PROMPT, params)) == 301


def test_a_package_without_scales_has_no_int8_cache(tiny_package: Path, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(read_manifest(tiny_package), cache_scales=None)
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    with pytest.raises(IncompatiblePackageError, match="has no scales for an int8 cache"):
        Engine.load(tmp_path, options=INT8)


def test_a_graph_without_such_attention_is_refused(tiny_package: Path) -> None:
    manifest = read_manifest(tiny_package)
    assert manifest.cache_scales is not None
    scales = cache_scales(manifest.cache_scales, manifest.model)
    model = onnx.load(tiny_package / MODEL_NAME, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "Attention"
    with pytest.raises(IncompatiblePackageError, match=r"0 attention layers .* the manifest has 2"):
        with_cache(memoryview(model.SerializeToString()), 2, scales=scales)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(PackageError):
        with_cache(memoryview(b"\x3a\xff\xff"), 0)
