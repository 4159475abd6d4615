"""Model folders of onnxruntime-genai become packages with their weights as they are, or are refused with reasons."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lamplighter_agent.engine.generate import Engine
from lamplighter_agent.engine.options import EngineOptions
from lamplighter_agent.errors import BuildError, CheckpointError, UnsupportedModelError
from lamplighter_agent.package.hashing import verify_file
from lamplighter_agent.package.manifest import UNKNOWN_LICENCE, Manifest, read_manifest
from lamplighter_builder.cli import main
from lamplighter_builder.genai_import import ImportOptions, import_package
from lamplighter_builder.parity import Reference, compare_logits
from lamplighter_builder.progress import SilentProgress
from lamplighter_builder.runner import Runner
from support.packages import load_manifest
from support.tiny_model import build_tiny_package

ModelChange = Callable[[onnx.ModelProto], object]


def strip(package: Path, folder: Path) -> Path:
    """Copy what onnxruntime-genai knows of a package: all but the manifest."""
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def do_import(folder: Path, output: Path) -> Manifest:
    options = ImportOptions(output=output, name="imported", version="1.0.0", licence="MIT")
    return import_package(folder, options, SilentProgress())


def change_model(folder: Path, change: ModelChange) -> None:
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def leave_cache_open(model: onnx.ModelProto) -> None:
    """Name the cache's sizes, as onnxruntime-genai's builder does; its configuration has the numbers."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[1].dim_param = "heads"
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"


def weights_of(folder: Path) -> dict[str, bytes]:
    """Read every external tensor of a folder, and check that it begins on a page."""
    found = {}
    data = (folder / "model.onnx.data").read_bytes()
    for tensor in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(entries.get("offset", "0")), int(entries["length"])
            found[tensor.name] = data[start : start + length]
    return found


@pytest.fixture(scope="module")
def folder(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strip(tiny_int4, tmp_path_factory.mktemp("stripped") / "folder")


def test_our_own_package_comes_back_as_it_was(tiny_int4: Path, folder: Path, tmp_path: Path) -> None:
    manifest, original = do_import(folder, tmp_path / "package"), read_manifest(tiny_int4)
    assert (manifest.self_tests, manifest.chat_format) == (original.self_tests, original.chat_format)
    assert manifest.precision.name == "int4"
    assert {group.name: group.length_bytes for group in manifest.precision.groups} == {
        group.name: group.length_bytes for group in original.precision.groups
    }
    assert manifest.memory.weights_bytes == original.memory.weights_bytes
    assert manifest.memory.prefill_scratch_bytes == original.memory.prefill_scratch_bytes
    assert manifest.memory.kv_bytes_per_token == {"float32": original.memory.kv_bytes_per_token["float32"]}
    assert manifest.target == original.target
    assert manifest.model.parameters == original.model.parameters
    assert manifest.model.intermediate_size == original.model.intermediate_size
    assert weights_of(tmp_path / "package") == weights_of(tiny_int4)
    for entry in manifest.files:
        verify_file(tmp_path / "package" / entry.name, entry)


def test_codes_of_five_and_six_bits_are_told_as_what_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    built = ["build", "-m", str(tiny_checkpoint), "-o", str(tmp_path / "built"), "-p", "int4", "--licence", "MIT"]
    assert main([*built, "--target-mb", "0.2", "--calibration", __file__, "--no-fidelity"]) == 0
    manifest = do_import(strip(tmp_path / "built", tmp_path / "folder"), tmp_path / "imported")
    original = read_manifest(tmp_path / "built")
    assert {group.bits for group in original.precision.groups} >= {4, 5, 6}
    facts = [
        {(group.name, group.bits, group.block_size, group.symmetric, group.length_bytes) for group in one.groups}
        for one in (manifest.precision, original.precision)
    ]
    assert facts[0] == facts[1]
    assert manifest.memory.weights_bytes == original.memory.weights_bytes
    assert manifest.model.parameters == original.model.parameters
    assert manifest.self_tests == original.self_tests


def test_folder_whose_graph_leaves_its_cache_open_is_evaluated_as_the_package(
    tiny_int4: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = strip(tiny_int4, tmp_path / "folder")
    change_model(folder, leave_cache_open)
    assert main(["evaluate", str(folder), str(tiny_int4), "--reference", str(tiny_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Only a package has scales for an 8-bit cache.
    assert found[str(folder)] == found[str(tiny_int4)] | {"int8_cache": None}
    assert found[str(folder)]["accuracy_level"]["tokens"] > 0


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_other_precisions_are_recognised(tiny_checkpoint: Path, precision: str, tmp_path: Path) -> None:
    package = build_tiny_package(tiny_checkpoint, tmp_path / "built", precision)  # type: ignore[arg-type]
    manifest = do_import(strip(package, tmp_path / "folder"), tmp_path / "imported")
    assert manifest.precision.name == precision
    assert manifest.self_tests == read_manifest(package).self_tests


@pytest.mark.genai
@pytest.mark.parametrize(("checkpoint", "precision"), [("tiny_checkpoint", "int4"), ("untied_checkpoint", "fp32")])
def test_folder_of_their_builder_becomes_a_package(
    checkpoint: str, precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    source, theirs, package = request.getfixturevalue(checkpoint), tmp_path / "theirs", tmp_path / "package"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", source, "-i", source, "-o", theirs]
    command += ["-p", precision, "-e", "cpu", "-c", tmp_path / "cache"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    manifest = do_import(theirs, package)
    assert manifest.precision.name == precision
    assert manifest.model.intermediate_size == 96
    assert weights_of(package).items() >= weights_of(theirs).items()
    test = manifest.self_tests[0]
    parameters = og.GeneratorParams(model := og.Model(str(theirs)))
    parameters.set_search_options(max_length=len(test.prompt_tokens) + 64, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(test.prompt_tokens))
    for expected in test.expected_tokens:
        generator.generate_next_token()
        assert int(generator.get_next_tokens()[0]) == expected
    engine = Engine.load(package, options=EngineOptions(threads=1))
    found = [token.token_id for token in engine.generate(list(test.prompt_tokens)) if token.token_id is not None]
    engine.close()
    assert tuple(found[: test.min_matching_tokens]) == test.expected_tokens[: test.min_matching_tokens]
    if precision == "fp32":
        runner, prompt = Runner(package / "model.onnx"), np.arange(5, 45, dtype=np.int64)[None]
        logits, _ = runner.run(prompt, runner.empty_cache())
        assert compare_logits(Reference.load(source).logits(prompt), logits).max_difference < 1e-3


def test_weights_are_moved_to_page_boundaries_and_inline_ones_out_of_the_graph(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "folder")
    data = (moved / "model.onnx.data").read_bytes()
    (moved / "model.onnx.data").write_bytes(bytes(100) + data)
    name = "model.layers.0.self_attn.o_proj.weight_codes"

    def shift_and_inline(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if tensor.name == name:
                start, length = int(entries["offset"].value), int(entries["length"].value)
                tensor.ClearField("external_data")
                tensor.data_location, tensor.raw_data = TensorProto.DEFAULT, data[start : start + length]
            elif entries:
                entries["offset"].value = str(int(entries["offset"].value) + 100)

    change_model(moved, shift_and_inline)
    do_import(moved, tmp_path / "package")
    assert weights_of(tmp_path / "package") == weights_of(folder)
    model = onnx.load(str(tmp_path / "package" / "model.onnx"), load_external_data=False)
    offsets = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "offset"}
    assert all(int(offset) % 4096 == 0 for offset in offsets)


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].name = "mask"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "mask"


def window_the_cache(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    node.attribute.append(helper.make_attribute("sliding_window_cache", 1))
    node.attribute.append(helper.make_attribute("local_window_size", 24))


def test_windowed_layers_get_whole_caches(folder: Path, tmp_path: Path) -> None:
    windowed = shutil.copytree(folder, tmp_path / "folder")
    change_model(windowed, window_the_cache)
    config = json.loads((windowed / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"] = {"window_size": 24, "layers": [0], "slide_inputs": False}
    (windowed / "genai_config.json").write_text(json.dumps(config))
    manifest = do_import(windowed, tmp_path / "package")
    assert (manifest.model.sliding_window, manifest.model.sliding_layers) == (24, (0,))
    model = onnx.load(str(tmp_path / "package" / "model.onnx"), load_external_data=False)
    names = {attribute.name for node in model.graph.node for attribute in node.attribute}
    assert "sliding_window_cache" not in names
    assert "sliding_window" not in (tmp_path / "package" / "genai_config.json").read_text()


def test_caches_are_as_wide_as_the_widest_window(folder: Path, tmp_path: Path) -> None:
    windowed = shutil.copytree(folder, tmp_path / "folder")

    def window_both(model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
        for node, window in zip(nodes, (24, 40), strict=True):
            node.attribute.append(helper.make_attribute("local_window_size", window))

    change_model(windowed, window_both)
    model = do_import(windowed, tmp_path / "package").model
    assert (model.sliding_window, model.sliding_layers) == (40, None)


def test_window_that_the_graph_does_not_have_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As onnxruntime-genai's builder writes Mistral 7B v0.1."""
    windowed = shutil.copytree(folder, tmp_path / "folder")
    window = {"window_size": 24, "slide_key_value_cache": False, "slide_inputs": False, "layers": []}
    edit_config(windowed, lambda decoder: decoder.update(sliding_window=window))
    assert main(["import", str(windowed), "-o", str(tmp_path / "package"), "--licence", "MIT"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "names a window of 24 tokens, but the graph's attention has none" in warnings[0]
    assert read_manifest(tmp_path / "package").model.sliding_window is None


def detach_a_cache(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    node.input[3], node.input[4] = node.input[4], node.input[3]


def use_a_foreign_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.elsewhere", 1))


def widen_the_cache(model: onnx.ModelProto) -> None:
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_value = 3


def add_an_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("beam_width", TensorProto.INT64, [1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_input, "no input attention_mask; an unknown input mask"),
        (detach_a_cache, "its cache is not a graph input and output of one layer"),
        (use_a_foreign_domain, "operators of com.elsewhere"),
        (widen_the_cache, r"past_key_values.0.key is float \['batch_size', 3, .*must be float \['any', 2, 'any', 16\]"),
        (add_an_input, "an unknown input beam_width"),
    ],
)
def test_graph_that_differs_is_refused_with_what_differs(
    change: ModelChange, words: str, folder: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(folder, tmp_path / "folder")
    change_model(changed, change)
    with pytest.raises(UnsupportedModelError, match=words):
        do_import(changed, tmp_path / "package")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_float16_graph_is_refused_for_the_cpu_and_taken_for_its_provider(tiny_checkpoint: Path, tmp_path: Path) -> None:
    package = build_tiny_package(tiny_checkpoint, tmp_path / "cuda", "int4", execution_provider="cuda")
    changed = strip(package, tmp_path / "folder")
    manifest = do_import(changed, tmp_path / "imported")
    assert (manifest.target.execution_provider, manifest.memory.kv_bytes_per_token) == ("cuda", {"float16": 256})
    edit_config(changed, lambda decoder: decoder.pop("session_options"))
    with pytest.raises(UnsupportedModelError, match="the agent's CPU engine takes float32"):
        do_import(changed, tmp_path / "again")


def edit_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    change(config["model"]["decoder"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda decoder: decoder["outputs"].update(logits="scores"),
            UnsupportedModelError,
            "logits is called 'scores'",
        ),
        (lambda decoder: decoder.update(num_attention_heads=8), UnsupportedModelError, "4 and 2 heads, but the conf"),
        (lambda decoder: decoder.update(filename="../model.onnx"), CheckpointError, "decoder.filename"),
        (lambda decoder: decoder.update(filename="other.onnx"), CheckpointError, "no such file"),
        (lambda decoder: decoder.pop("head_size"), CheckpointError, "'head_size' is missing"),
        (lambda decoder: decoder.update(hidden_size=0), CheckpointError, "hidden_size is 0"),
        (
            lambda decoder: decoder.update(hidden_size=63),
            UnsupportedModelError,
            r"output hidden_states is float .*, 64\], but must be float \['any', 'any', 63\]",
        ),
        (lambda decoder: decoder.update(num_hidden_layers=10**9), CheckpointError, "must be from 1 to 4096"),
        (
            lambda decoder: decoder["session_options"].update(provider_options=[{"QNN": {}}]),
            UnsupportedModelError,
            "made for the provider 'qnn'",
        ),
    ],
)
def test_configuration_that_does_not_suit_is_refused(
    change: Callable[[dict[str, object]], object],
    error: type[Exception],
    words: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    changed = shutil.copytree(folder, tmp_path / "folder")
    edit_config(changed, change)
    with pytest.raises(error, match=words):
        do_import(changed, tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("context", "error", "words"),
    [
        (1, CheckpointError, "context_length is 1, but must be from 2"),
        (513, UnsupportedModelError, "rotary tables have 512 rows, but context_length is 513"),
    ],
)
def test_context_that_the_graph_cannot_have_is_refused(
    context: int, error: type[Exception], words: str, folder: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(folder, tmp_path / "folder")
    config = json.loads((changed / "genai_config.json").read_text())
    config["model"]["context_length"] = context
    (changed / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        do_import(changed, tmp_path / "package")


def test_weights_that_give_no_numbers_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    changed = strip(build_tiny_package(tiny_checkpoint, tmp_path / "built", "fp32"), tmp_path / "folder")
    data = changed / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    with pytest.raises(BuildError, match="the model gives logits that are not finite"):
        do_import(changed, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_truncated_or_missing_weights_leave_nothing(folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / "folder")
    data = changed / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside the tensor"):
        do_import(changed, tmp_path / "package")
    data.unlink()
    with pytest.raises(CheckpointError, match=r"there is no model\.onnx\.data"):
        do_import(changed, tmp_path / "package")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_weights_outside_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / "folder")

    def escape(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"

    change_model(changed, escape)
    with pytest.raises(CheckpointError, match=r"'\.\./secret' is not allowed"):
        do_import(changed, tmp_path / "package")


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(folder), "-o", str(tmp_path / "unnamed")]) == 0
    assert "--licence" in capsys.readouterr().err
    assert load_manifest(tmp_path / "unnamed").licence == UNKNOWN_LICENCE
    assert main(["import", str(folder), "-o", str(tmp_path / "package"), "--licence", "MIT", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["package"] == "folder/1.0.0"
    assert main(["inspect", str(tmp_path / "package"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"]["linear"] == "uint4/32"
