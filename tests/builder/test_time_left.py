"""The time left of a build, as arithmetic: shares of stages, and the pace so far."""

from __future__ import annotations

import pytest

from lamplighter_builder.course import expected_course
from lamplighter_builder.time_left import TimeLeft


def test_nothing_is_told_before_the_first_stage_tells_something() -> None:
    course = TimeLeft({"listen": 10.0, "round": 10.0}, now=0.0)
    course.begin("listen", now=5.0)
    assert course.left(0.0, now=65.0) is None
    assert course.left(0.01, now=65.0) is None


def test_time_before_the_first_stage_is_no_part_of_the_pace() -> None:
    course = TimeLeft({"listen": 10.0, "round": 10.0}, now=0.0)
    course.begin("listen", now=100.0)
    assert course.left(0.5, now=110.0) == 10.0 + 20.0


def test_stage_at_hand_goes_on_at_its_own_pace_however_wrong_its_share() -> None:
    course = TimeLeft({"listen": 10.0, "round": 90.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("round", now=10.0)
    # At the pace of the first stage it would take 90.
    assert course.left(0.5, now=15.0) == 5.0


def test_stage_that_has_only_begun_takes_the_pace_of_those_before() -> None:
    course = TimeLeft({"listen": 10.0, "round": 30.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("round", now=20.0)
    assert course.left(0.0, now=20.0) == 60.0
    assert course.left(0.0, now=30.0) == 50.0


def test_stage_slower_than_expected_is_never_expected_to_be_over_before_now() -> None:
    course = TimeLeft({"listen": 10.0, "round": 10.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("round", now=10.0)
    assert course.left(0.0, now=500.0) == 0.0


def test_stages_to_come_take_the_pace_of_all_that_is_done() -> None:
    course = TimeLeft({"listen": 10.0, "round": 10.0, "check": 40.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("round", now=10.0)
    assert course.left(1.0, now=40.0) == 80.0  # 40 for 20 parts


def test_stage_that_was_left_out_is_not_waited_for() -> None:
    course = TimeLeft({"listen": 10.0, "weigh": 500.0, "round": 10.0, "check": 10.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("round", now=10.0)
    assert course.left(1.0, now=20.0) == 10.0


def test_stage_that_nobody_expected_tells_of_itself_and_leaves_the_pace_alone() -> None:
    course = TimeLeft({"listen": 10.0, "check": 10.0}, now=0.0)
    course.begin("listen", now=0.0)
    course.begin("surprise", now=10.0)
    assert course.left(0.5, now=110.0) == 100.0 + 10.0
    course.begin("check", now=210.0)
    assert course.left(0.0, now=210.0) == 10.0


def test_end_of_the_last_stage_has_nothing_left() -> None:
    course = TimeLeft({"listen": 10.0}, now=0.0)
    course.begin("listen", now=0.0)
    assert course.left(1.0, now=10.0) is None


def of(hidden_size: int, heard_tokens: int) -> dict[str, float]:
    return expected_course(
        "int4", "gptq", hidden_size=hidden_size, heard_tokens=heard_tokens, sized=True, runs=True, compares=True
    )


@pytest.mark.parametrize("heard_tokens", [1024, 10_000])
def test_course_of_a_build_that_listens_grows_with_what_it_listens_to(heard_tokens: int) -> None:
    course, longer = of(576, heard_tokens), of(576, 2 * heard_tokens)
    grown = {title for title, share in course.items() if longer[title] > share}
    assert grown == {"calibration: listening", "calibration: rounding"}
    assert list(course)[:4] == ["calibration: listening", "calibration: weighing", "calibration: rounding", "weights"]


def test_wide_matrices_take_longest_to_round() -> None:
    small, large = of(576, 9728), of(3072, 2560)
    assert max(small, key=lambda title: small[title]) == "calibration: listening"
    assert max(large, key=lambda title: large[title]) == "calibration: rounding"
