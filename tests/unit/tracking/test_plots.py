"""Pictures come out of whole, short and poor records alike."""

from __future__ import annotations

import math
import random

import pytest
from matplotlib import image

from hfdist.tracking.plots import _evaluations, _fall, draw_plots

NAMES = ["convergence.png", "cg.png", "damping.png"]


def record(step: int) -> dict:
    return {
        "step": step,
        "loss": 2.0 * math.exp(-step),
        "final_loss": math.exp(-step),
        "eval/loss": math.exp(-(step // 2)),
        "wall_seconds": 0.1 * step,
        "data_passes": 1.0 + step,
        "damping": 0.9**step,
        "reduction_ratio": 5.0 if step == 2 else 0.8,
        "accepted": float(step != 3),
        "cg_iterations": 4.0,
        "chosen_iterate": 3.0,
        "quadratic": [0.0, -1.0, -1.5, -1.6],
    }


@pytest.mark.parametrize(
    "records",
    [
        [record(k) for k in range(6)],
        [record(0)],
        [{"step": 0}],
        [{"step": 3, "final_loss": -1.0, "quadratic": [0.0]}],
        [record(0) | {"damping": 0.0, "quadratic": [1.0, 1.0, 1.0]}],
    ],
    ids=["whole", "one step", "empty", "negative loss", "undamped"],
)
@pytest.mark.filterwarnings("error")
def test_pictures(records, tmp_path):
    paths = draw_plots(records, tmp_path / "plots")
    assert [path.name for path in paths] == NAMES
    for path in paths:
        picture = image.imread(path)
        assert picture.shape[1] > 1000
        assert picture.std() > 0.02  # not blank


ODD = [math.inf, -math.inf, math.nan, 0.0, -1.0, 1e308, -1e308, 5e-324, 1e200, 2.0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("error")
def test_any_numbers_make_pictures(seed, tmp_path):
    dice = random.Random(seed)
    records = []
    for step in range(4):
        odd = {k: dice.choice(ODD) for k in record(0) if k not in ("step", "quadratic")}
        curve = [dice.choice(ODD) for _ in range(4)]
        records.append(odd | {"step": step, "quadratic": curve})
    paths = draw_plots(records, tmp_path / "plots")
    assert [path.name for path in paths] == NAMES


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.filterwarnings("error")
def test_one_number_at_every_step_makes_pictures(odd, tmp_path):
    records = [
        dict.fromkeys(record(0), odd) | {"step": k, "quadratic": [odd] * 4} for k in range(3)
    ]
    paths = draw_plots(records, tmp_path / "plots")
    assert [path.name for path in paths] == NAMES


def test_no_records_no_pictures(tmp_path):
    assert draw_plots([], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_an_evaluation_is_drawn_where_it_was_made():
    assert [r["step"] for r in _evaluations([record(k) for k in range(6)])] == [0, 2, 4]


def test_the_fall_of_a_solve_is_relative_to_the_whole():
    assert _fall([1.0, -1.0, -3.0]) == [1.0, 0.5]
    assert _fall([0.0, -1.0]) == []
    assert _fall([0.0, 1.0, 2.0]) == []
