"""Damping, backtracking and line search: the small rules of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfdist.optim.backtracking import NEARLY, backtrack, climb
from hfdist.optim.damping import (
    DAMPING_RULES,
    Outcome,
    levenberg_marquardt,
    next_damping,
    raised,
    reduction_ratio,
)
from hfdist.optim.line_search import line_search
from hfdist.optim.options import PRESETS, HFOptions


class Losses:
    """Loss by place, counting what is evaluated."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.asked = values, []

    def __call__(self, places: Sequence[int]) -> list[float]:
        self.asked += list(places)
        return [self.values[place] for place in places]


# -- damping


@pytest.mark.parametrize(
    ("rho", "factor"),
    [
        (0.2, 3 / 2),
        (-1.0, 3 / 2),
        (math.nan, 3 / 2),
        (math.inf, 3 / 2),
        (0.25, 1),
        (0.5, 1),
        (0.75, 1),
        (0.8, 2 / 3),
    ],
)
def test_levenberg_marquardt(rho: float, factor: float) -> None:
    assert levenberg_marquardt(0.3, rho, HFOptions()) == pytest.approx(0.3 * factor)


def test_damping_stays_within_its_bounds() -> None:
    options = HFOptions(damping_min=0.1, damping_max=10.0)
    assert levenberg_marquardt(0.1, 0.9, options) == 0.1
    assert levenberg_marquardt(10.0, 0.1, options) == 10.0
    assert raised(10.0, options) == 10.0
    # A start outside of the bounds is the user's choice: it moves towards them, never away.
    assert levenberg_marquardt(0.01, 0.9, options) == 0.01
    assert raised(20.0, options) == 20.0


def test_reduction_ratio_of_no_prediction_is_nan() -> None:
    assert math.isnan(reduction_ratio(-1.0, 0.0))
    assert reduction_ratio(-1.0, -2.0) == 0.5


# -- backtracking


def test_efficient_stops_at_the_first_rise() -> None:
    losses = Losses([0.0, 5.0, 1.0, 2.0, 3.0])
    choice = backtrack(5, losses, "efficient")
    assert (choice.index, choice.loss) == (2, 1.0)
    assert losses.asked == [4, 3, 2, 1]


def test_full_finds_the_lowest() -> None:
    choice = backtrack(5, Losses([0.5, 5.0, 1.0, 2.0, 3.0]), "full")
    assert (choice.index, choice.loss) == (0, 0.5)


@pytest.mark.parametrize("rule", ["efficient", "full"])
def test_non_finite_losses_are_passed_over(rule: str) -> None:
    choice = backtrack(4, Losses([3.0, 1.0, math.nan, math.inf]), rule)
    assert (choice.index, choice.loss) == (1, 1.0)
    worst = backtrack(2, Losses([math.nan, math.nan]), rule)
    assert worst.loss == math.inf


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_efficient_is_never_worse_than_the_last_iterate(values: list[float]) -> None:
    choice = backtrack(len(values), Losses(values), "efficient")
    last = values[-1]
    assert choice.loss <= (last if math.isfinite(last) else math.inf)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
    st.integers(1, 25),
)
def test_the_choice_does_not_depend_on_how_many_are_asked_at_once(
    values: list[float], at_once: int
) -> None:
    one_by_one, together = Losses(values), Losses(values)
    choice = backtrack(len(values), one_by_one, "efficient")
    assert backtrack(len(values), together, "efficient", at_once) == choice
    assert together.asked[: len(one_by_one.asked)] == one_by_one.asked
    assert len(together.asked) < len(one_by_one.asked) + at_once


# -- the climb over lambda


def test_the_climb_begins_with_the_centre_and_its_neighbours() -> None:
    losses = Losses([5.0, 4.0, 3.0, 1.0, 2.0, 6.0])
    choice = climb(6, 3, losses, loss_0=9.0, wide=False)
    assert (choice.index, choice.loss) == (3, 1.0)
    assert losses.asked == [2, 3, 4]


@pytest.mark.parametrize("values", [[9, 8, 7, 6, 5, 4, 3, 0], [0, 3, 4, 5, 6, 7, 8, 9]])
def test_the_climb_follows_the_falling_loss_to_either_end(values: list[float]) -> None:
    losses = Losses(values)
    assert climb(8, 4, losses, loss_0=20.0, wide=False).loss == 0
    assert len(losses.asked) == len(set(losses.asked)), "each is evaluated once"


def test_without_descent_the_climb_goes_to_large_lambda() -> None:
    losses = Losses([0.9, 1.1, math.nan, 3.0, math.inf, math.inf, math.inf])
    choice = climb(7, 5, losses, loss_0=1.0, wide=False)
    assert (choice.index, choice.loss) == (0, 0.9)
    choice = climb(7, 5, Losses([2.0] * 7), loss_0=1.0, wide=False)
    assert choice.loss == 2.0
    assert climb(3, 1, Losses([math.nan] * 3), loss_0=1.0, wide=False).loss == math.inf


def test_of_nearly_equal_losses_the_climb_takes_the_smaller_lambda() -> None:
    gain, best = 1.0, 9.0
    near, far = best + 0.9 * NEARLY * gain, best + 1.1 * NEARLY * gain
    assert climb(3, 1, Losses([9.8, best, near]), loss_0=10.0, wide=False).index == 2
    assert climb(3, 1, Losses([9.8, best, far]), loss_0=10.0, wide=False).index == 1


def test_a_wide_climb_looks_at_all_sizes() -> None:
    losses = Losses([10.0 - k for k in range(8)] + [5.0])
    choice = climb(9, 0, losses, loss_0=11.0, wide=True)
    assert losses.asked[:3] == [0, 3, 6]
    assert (choice.index, choice.loss) == (7, 3.0)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
    st.integers(0, 19),
    st.booleans(),
)
def test_the_climb_ends_and_keeps_the_loss_that_it_says(
    values: list[float], centre: int, wide: bool
) -> None:
    losses, loss_0 = Losses(values), 1.0
    choice = climb(len(values), min(centre, len(values) - 1), losses, loss_0, wide)
    found = [values[k] if math.isfinite(values[k]) else math.inf for k in losses.asked]
    assert choice.index in losses.asked
    assert choice.loss == found[losses.asked.index(choice.index)]
    assert len(losses.asked) == len(set(losses.asked))
    if min(found) < loss_0:
        assert choice.loss < loss_0


# -- line search


def test_armijo_takes_the_first_that_fits() -> None:
    tried = []

    def losses_at(alphas: Sequence[float]) -> list[float]:
        tried.extend(alphas)
        return [(alpha - 0.3) ** 2 for alpha in alphas]

    found = line_search(losses_at, 0.09, -0.6, HFOptions())
    assert found.alpha == tried[-1]
    assert found.loss <= 0.09 - 0.01 * found.alpha * 0.6
    assert tried[:2] == pytest.approx([1.0, 0.8])


def test_known_loss_is_not_evaluated_again() -> None:
    def losses_at(alphas: Sequence[float]) -> list[float]:
        raise AssertionError("f(1) was known")

    assert line_search(losses_at, 1.0, -1.0, HFOptions(), loss_1=0.1).alpha == 1.0


@pytest.mark.parametrize("bad", [2.0, math.nan, math.inf])
def test_no_fit_rejects(bad: float) -> None:
    for at_once, number in ((1, 60), (7, 10), (100, 2)):
        calls: list[Sequence[float]] = []
        options = HFOptions(candidates_per_pass=at_once)
        found = line_search(
            lambda a, calls=calls: calls.append(a) or [bad] * len(a), 1.0, -1.0, options
        )
        assert (found.alpha, found.loss) == (0.0, 1.0)
        assert len(calls) == number
        assert [alpha for group in calls for alpha in group] == pytest.approx(
            [0.8**k for k in range(60)]
        )


@given(st.floats(0.001, 2.0), st.integers(1, 60), st.integers(1, 70))
def test_the_step_size_does_not_depend_on_how_many_are_asked_at_once(
    centre: float, tries: int, at_once: int
) -> None:
    def losses_at(alphas: Sequence[float]) -> list[float]:
        return [(alpha - centre) ** 2 for alpha in alphas]

    found = [
        line_search(
            losses_at,
            centre**2,
            -2 * centre,
            HFOptions(linesearch_max_iter=tries, candidates_per_pass=n),
        )
        for n in (1, at_once)
    ]
    assert found[0] == found[1]


def test_a_rising_slope_does_not_let_the_loss_rise() -> None:
    found = line_search(lambda alphas: [1.0 + 0.005 * a for a in alphas], 1.0, 1.0, HFOptions())
    assert found.alpha == 0.0


# -- options


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("damping", -1.0),
        ("damping", math.nan),
        ("cg_max_iter", 0),
        ("linesearch_beta", 1.0),
        ("candidates_per_pass", 0),
        ("cg_grid_gamma", 1.0),
        ("curvature_opt", "fisher"),
        ("damping_max", 0.0),
        ("cg_decay_x0_max", 0.5),
        ("damping_decrease", 1.5),
    ],
)
def test_bad_option_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        HFOptions(**{key: value})
    assert str(value) in str(caught.value)


def test_presets_are_valid_and_a_change_wins() -> None:
    for name in PRESETS:
        assert HFOptions.with_preset(name).preset == name
    assert HFOptions.with_preset("seed", linesearch_max_iter=3).linesearch_max_iter == 3
    with pytest.raises(ValueError, match="literature"):
        HFOptions.with_preset("literature")


@pytest.mark.parametrize("rule", [None, *DAMPING_RULES])
@pytest.mark.parametrize("accepted", [False, True])
@given(st.floats(1e-3, 1e3), st.floats(allow_nan=True, allow_infinity=True))
def test_every_damping_rule_stays_within_the_bounds(
    rule: str | None, accepted: bool, damping: float, rho: float
) -> None:
    options = HFOptions(damping_rule=rule or "auto", damping_min=1e-3, damping_max=1e3)
    outcome = Outcome(damping=damping, rho=rho, accepted=accepted, candidate_damping=damping / 4)
    following = next_damping(outcome, options, "lm")
    assert 1e-3 <= following <= 1e3
    assert next_damping(outcome, replace(options, adapt_damping=False), "lm") == damping
    if rule is None:
        assert following == next_damping(outcome, replace(options, damping_rule="lm"), "chosen")


@pytest.mark.parametrize("rule", DAMPING_RULES)
@pytest.mark.parametrize("accepted", [False, True])
def test_no_damping_stays_none(rule: Any, accepted: bool) -> None:
    outcome = Outcome(damping=0.0, rho=0.9, accepted=accepted, candidate_damping=0.0)
    assert next_damping(outcome, HFOptions(damping=0.0, damping_rule=rule), "lm") == 0.0


def test_a_step_that_no_candidate_made_raises_its_own_lambda() -> None:
    outcome = Outcome(damping=0.5, accepted=False, candidate_damping=1e9)
    assert next_damping(outcome, HFOptions(), "chosen") == 2.0


def test_the_option_names_exactly_the_damping_rules() -> None:
    assert set(get_args(get_type_hints(HFOptions)["damping_rule"])) == {"auto", *DAMPING_RULES}
    outcome = Outcome(damping=2.0, rho=0.5, accepted=True, candidate_damping=8.0)
    following = {
        rule: next_damping(outcome, HFOptions(damping_rule=rule, damping_decay=0.5), "lm")  # type: ignore[arg-type]
        for rule in DAMPING_RULES
    }
    assert following == {"lm": 2.0, "fixed": 2.0, "schedule": 1.0, "chosen": 8.0, "trials": 8.0}
