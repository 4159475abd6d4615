from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamplighter_agent.engine.speculation import WIDTHS, NgramIndex, Speculator, StepCosts


def test_a_draft_is_what_followed_the_longest_match() -> None:
    index = NgramIndex([1, 2, 3, 4, 5, 9, 9, 2, 3, 7, 8, 1, 2, 3])
    # Two places end in 2 3; the newer one is followed by 7, but the older one has 1 before.
    assert index.draft(2) == ([4, 5], 3)


def test_new_text_gives_no_draft() -> None:
    assert NgramIndex([1, 2, 3, 4]).draft(4) == ([], 0)
    assert NgramIndex([7]).draft(4) == ([], 0)
    assert NgramIndex([]).draft(4) == ([], 0)


def test_text_that_was_appended_is_found() -> None:
    index = NgramIndex([1, 2])
    index.extend([3, 4, 1, 2])
    assert index.draft(8) == ([3, 4, 1, 2], 2)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_a_draft_continues_an_earlier_place_that_agrees(text: list[int], most: int) -> None:
    tokens, match = NgramIndex(text).draft(most)
    if not tokens:
        assert match == 0
        return
    places = [
        place
        for place in range(match, len(text))
        if text[place - match : place] == text[len(text) - match :] and text[place : place + most] == tokens
    ]
    assert places


def test_unmeasured_costs_grow_with_the_rows() -> None:
    costs = StepCosts()
    assert costs.relative(1) == 1.0
    assert costs.relative(2) < costs.relative(4) < costs.relative(8)


def test_costs_follow_the_measurements() -> None:
    costs = StepCosts()
    for _ in range(200):
        costs.observe(1, 0.010)
        costs.observe(4, 0.030)
    assert costs.relative(4) == pytest.approx(3.0, rel=0.05)


def test_a_step_that_was_held_up_is_not_believed() -> None:
    costs = StepCosts()
    for _ in range(50):
        costs.observe(1, 0.010)
    costs.observe(1, 5.0)
    costs.observe(2, 0.010)
    assert costs.relative(2) > 0.9


def test_a_cost_that_is_too_high_is_forgotten_if_not_measured_again() -> None:
    costs = StepCosts()
    costs.observe(1, 0.010)
    costs.observe(4, 1.0)
    before = costs.relative(4)
    for _ in range(2000):
        costs.observe(1, 0.010)
    assert costs.relative(4) < 3 < before


def follow(speculator: Speculator, text: list[int], usable: tuple[int, ...] = WIDTHS) -> list[int]:
    """Play a text that comes as it will; return the number of tokens drafted in each step."""
    drafts = []
    while text:
        draft = speculator.draft(len(text) - 1, usable)
        drafts.append(len(draft))
        taken = 0
        while taken < len(draft) and draft[taken] == text[taken]:
            taken += 1
        speculator.note(text[: taken + 1])
        text = text[taken + 1 :]
    return drafts


def test_a_copied_text_is_drafted_in_ever_longer_pieces() -> None:
    prompt = list(range(100))
    speculator = Speculator(prompt, StepCosts())
    drafts = follow(speculator, prompt[10:90])
    assert max(drafts) == 7
    assert len(drafts) < 30
    assert sum(drafts) >= 80 - len(drafts)


def test_where_drafts_fail_nothing_is_drafted_any_more() -> None:
    prompt = [token for number in range(60) for token in (1, 2, 100 + number)]
    speculator = Speculator(prompt, StepCosts())
    drafts = follow(speculator, [token for number in range(60) for token in (1, 2, 300 + number)])
    assert sum(drafts) < 60
    # After 1 comes 2 every time, after 2 never what came before.
    assert sum(drafts[-30:]) <= 30


def test_widths_that_are_not_usable_are_left_out() -> None:
    prompt = list(range(100))
    drafts = follow(Speculator(prompt, StepCosts()), prompt[10:90], usable=(3,))
    assert set(drafts) <= {0, 2}
    assert follow(Speculator(prompt, StepCosts()), prompt[10:90], usable=()) == [0] * 80


def test_what_costs_as_much_as_single_steps_is_not_drafted() -> None:
    costs = StepCosts()
    for rows in (1, *WIDTHS):
        costs.observe(rows, 0.010 * rows)
    prompt = list(range(100))
    assert set(follow(Speculator(prompt, costs), prompt[10:90])) == {0}
