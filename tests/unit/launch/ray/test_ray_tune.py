"""Grids of a sweep."""

from __future__ import annotations

import pytest

from hfdist.errors import ConfigError
from hfdist.launch.ray.tune import points, split_grid, trial_id


def test_single_values_are_no_grid() -> None:
    fixed, grid = split_grid(["steps=3", "optim.damping=1e-2, 1e-1,1", "launch.workers=[1,2]"])
    assert fixed == ["steps=3", "launch.workers=[1,2]"]
    assert grid == {"optim.damping": ["1e-2", "1e-1", "1"]}


def test_commas_inside_of_values() -> None:
    _, grid = split_grid(["a=[1,2],[3]", 'b="x,y",z', "c={p: 1, q: 2},{}"])
    assert grid == {"a": ["[1,2]", "[3]"], "b": ['"x,y"', "z"], "c": ["{p: 1, q: 2}", "{}"]}


@pytest.mark.parametrize("overrides", [["a=1,,2"], ["a=1,"], ["a=1,2", "a=3,4"]])
def test_bad_grids(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match="a"):
        split_grid(overrides)


def test_points_and_their_names() -> None:
    grid = {"optim.damping": ["1", "2"], "seed": ["0", "1"]}
    combinations = points(grid)
    assert [list(p.values()) for p in combinations] == [
        ["1", "0"],
        ["1", "1"],
        ["2", "0"],
        ["2", "1"],
    ]
    assert trial_id("s", combinations[3], 3) == "s-03-damping-2-seed-1"
    assert "/" not in trial_id("s", {"task": "a/b.py:C"}, 0)
