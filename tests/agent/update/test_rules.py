"""The pure rules: the judgement on a trial, compatibility, references, the journal's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lamplighter_agent.errors import DiskFullError, IncompatiblePackageError, ManifestError, MemoryBudgetError
from lamplighter_agent.package.durable import storage_errors
from lamplighter_agent.package.manifest import Manifest
from lamplighter_agent.update.compatibility import DeviceFacts, check_compatible, read_cpu_features
from lamplighter_agent.update.journal import FailedVersion, Journal, JournalState
from lamplighter_agent.update.states import Desired, PackageRef, TrialLimits
from lamplighter_agent.update.trial import TrialMeasurement, judge_trial
from support.manifests import manifest_tree


def manifest(**changes: dict[str, Any] | list[Any]) -> Manifest:
    tree = manifest_tree()
    tree["self_tests"] = [
        {"prompt_tokens": [1], "expected_tokens": [5, 6, 7, 8], "min_matching_tokens": 3},
        {"prompt_tokens": [2], "expected_tokens": [9], "min_matching_tokens": 0},
    ]
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return msgspec.convert(tree, Manifest)


def measured(
    *tokens: tuple[int, ...], speed: float | None = 20.0, first_token_s: float | None = 0.5, rss: int | None = 1000
) -> TrialMeasurement:
    return TrialMeasurement(
        self_test_tokens=tokens or ((5, 6, 7, 8), (9,)),
        load_s=2.0,
        first_token_s=first_token_s,
        generated_tokens_per_s=speed,
        peak_rss_bytes=rss,
    )


@pytest.mark.parametrize(
    ("measurement", "limits", "code"),
    [
        (measured(), TrialLimits(), "passed"),
        (measured((5, 6, 7, 0), (1,)), TrialLimits(), "passed"),
        (measured((5, 6, 0, 8), (9,)), TrialLimits(), "self_test_mismatch"),
        (measured((5, 6), (9,)), TrialLimits(), "self_test_mismatch"),
        (measured((5, 6, 7, 8)), TrialLimits(), "self_test_missing"),
        (measured(), TrialLimits(max_load_s=2.0), "passed"),
        (measured(), TrialLimits(max_load_s=1.9), "load_slow"),
        (measured(), TrialLimits(max_first_token_s=0.4), "first_token_slow"),
        (measured(first_token_s=None), TrialLimits(max_first_token_s=0.4), "first_token_slow"),
        (measured(), TrialLimits(max_peak_rss_bytes=999), "memory_high"),
        (measured(rss=None), TrialLimits(max_peak_rss_bytes=999), "memory_high"),
        (measured(), TrialLimits(min_generated_tokens_per_s=20.0), "passed"),
        (measured(), TrialLimits(min_generated_tokens_per_s=20.1), "generation_slow"),
        (measured(speed=None), TrialLimits(min_generated_tokens_per_s=1.0), "generation_slow"),
        (measured(speed=None, first_token_s=None, rss=None), TrialLimits(), "passed"),
    ],
)
def test_trial_is_judged(measurement: TrialMeasurement, limits: TrialLimits, code: str) -> None:
    verdict = judge_trial(manifest(), measurement, limits)
    assert verdict.code == code
    assert verdict.passed == (code == "passed")


def test_limits_of_manifest_request_and_device_all_count() -> None:
    slow = manifest(trial_limits={"min_generated_tokens_per_s": 30.0})
    assert judge_trial(slow, measured(), TrialLimits(), TrialLimits()).code == "generation_slow"
    assert judge_trial(manifest(), measured(), TrialLimits(), TrialLimits(max_load_s=1.0)).code == "load_slow"
    assert judge_trial(manifest(), measured(), TrialLimits(max_load_s=3.0), TrialLimits()).passed


DEVICE = DeviceFacts(
    agent_version="0.3.0",
    onnxruntime_version="1.31.1",
    memory_bytes=5000,
    architecture="aarch64",
    cpu_features=frozenset({"asimd", "asimddp"}),
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": {"min_onnxruntime": "1.31"}},
        {"target": {"min_onnxruntime": "1.31.1"}},
        {"target": {"min_agent": "0.3"}},
        {"target": {"operator_domains": {"": 21, "com.microsoft": 1}}},
        {"memory": {"weights_bytes": 4000, "prefill_scratch_bytes": 1000}},
        {"target": {"below_onnxruntime": "1.32"}},
        {"target": {"architectures": ["x86_64", "aarch64"], "cpu_features": ["asimddp"]}},
    ],
)
def test_compatible_package_is_accepted(changes: dict[str, Any]) -> None:
    check_compatible(manifest(**changes), DEVICE)


def test_package_that_no_memory_plan_fits_is_refused() -> None:
    def check(package: Manifest) -> None:
        raise MemoryBudgetError(f"{package.reference} needs 7 bytes more")

    with pytest.raises(IncompatiblePackageError, match="7 bytes more"):
        check_compatible(manifest(), replace(DEVICE, check_memory=check))


def test_unknown_processor_features_are_no_reason_to_refuse() -> None:
    device = replace(DEVICE, cpu_features=None)
    assert check_compatible(manifest(target={"cpu_features": ["avx512f"]}), device) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 f16c\n", {"fpu", "avx2", "f16c"}),
        ("processor\t: 0\nFeatures\t: fp asimd\n", {"fp", "asimd"}),
    ],
)
def test_processor_features_are_read_as_linux_names_them(tmp_path: Path, text: str, features: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert read_cpu_features(tmp_path / "cpuinfo") == frozenset(features)
    assert read_cpu_features(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": {"execution_provider": "cuda"}}, "cuda"),
        ({"target": {"min_onnxruntime": "1.32"}}, r"1\.32"),
        ({"target": {"min_onnxruntime": "2"}}, "onnxruntime 2"),
        ({"target": {"min_onnxruntime": "newest"}}, "newest"),
        ({"target": {"min_agent": "0.10.0"}}, r"0\.10\.0"),
        ({"target": {"operator_domains": {"my.ops": 1}}}, r"my\.ops"),
        ({"target": {"below_onnxruntime": "1.31.1"}}, r"below 1\.31\.1"),
        ({"target": {"architectures": ["x86_64"]}}, "this device is aarch64"),
        ({"target": {"cpu_features": ["asimd", "i8mm"]}}, "i8mm"),
        ({"memory": {"weights_bytes": 4001, "prefill_scratch_bytes": 1000}}, "5001"),
    ],
)
def test_incompatible_package_is_refused_with_what_it_needs(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(IncompatiblePackageError, match=named):
        check_compatible(manifest(**changes), DEVICE)


@pytest.mark.parametrize("text", ["tiny", "a/b/c", "/a", "a/", "../a", "a/..", "a b/c", "a/\u0661", ".a/b"])
def test_reference_that_is_no_name_and_version_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        PackageRef.parse(text)


def test_reference_is_read_and_written() -> None:
    assert str(PackageRef.parse("tiny/1.0.0")) == "tiny/1.0.0"


def test_desired_of_a_newer_fleet_tool_is_understood() -> None:
    data = b'{"package": "tiny", "version": "1", "id": "x", "news": 1, "policy": {"mood": "calm"}}'
    assert msgspec.json.decode(data, type=Desired) == Desired(package="tiny", version="1", id="x")


def test_journal_holds_what_was_written(tmp_path: Path) -> None:
    failed = FailedVersion(reference=PackageRef("a", "1"), manifest_sha256="m", message="bad")
    state = JournalState().with_failure(failed)
    Journal(tmp_path / "journal").write(state)
    assert Journal(tmp_path / "journal").read() == state


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"failed": 1}', b" " * (2 * 1024 * 1024)])
def test_damaged_journal_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    assert Journal(tmp_path / "journal").read() == JournalState()


def test_failed_version_is_known_by_its_manifest() -> None:
    reference = PackageRef("a", "1")
    state = JournalState().with_failure(FailedVersion(reference=reference, manifest_sha256="m", message="bad"))
    assert state.failure_of(reference, "m") is not None
    assert state.failure_of(reference, "other") is None
    assert state.failure_of(PackageRef("a", "2"), "m") is None
    assert state.without_failure(reference) == JournalState()


def test_journal_forgets_the_oldest_failure() -> None:
    state = JournalState()
    for number in range(40):
        reference = PackageRef("a", str(number))
        state = state.with_failure(FailedVersion(reference=reference, manifest_sha256="m", message="bad"))
    assert len(state.failed) == 32
    assert state.failure_of(PackageRef("a", "39"), "m") is not None


def test_full_disk_is_told_as_such() -> None:
    with (
        pytest.raises(DiskFullError, match="No space left"),
        storage_errors("writing"),
        Path("/dev/full").open("wb", buffering=0) as stream,
    ):
        stream.write(b"x")
