"""What steps keep of their gains on other examples."""

from __future__ import annotations

import math

import pytest

from hfdist.optim.kept_gain import FIRST, KeptGain
from hfdist.optim.step import HFState


def after(losses: list[float], gain: float) -> list[KeptGain]:
    """Steps that find these losses, and gain so much each on their own examples."""
    found, kept = [], KeptGain()
    for loss in losses:
        kept = kept.seen(loss)
        found.append(kept)
        kept = kept.after(loss, gain)
    return found


def test_all_is_kept_where_the_examples_are_the_same() -> None:
    found = after([10.0 - 0.1 * k for k in range(60)], gain=0.1)
    assert all(math.isnan(kept.ratio) for kept in found[:FIRST])
    assert [kept.ratio for kept in found[FIRST:]] == pytest.approx([1.0] * (60 - FIRST))
    assert not any(kept.is_noise for kept in found)


def test_steps_that_keep_nothing_are_noise_once() -> None:
    found = after([3.0 + 0.01 * (-1) ** k for k in range(60)], gain=0.2)
    new = [kept.is_noise and not kept.was_noise for kept in found]
    assert new[:FIRST] == [False] * FIRST
    assert sum(new) == 1


def test_gains_as_small_as_rounding_say_nothing() -> None:
    found = after([3.0] * 60, gain=1e-6)
    assert all(math.isnan(kept.ratio) for kept in found)


def test_a_rejected_step_gains_nothing_and_a_loss_that_is_no_number_does_not_count() -> None:
    kept = KeptGain().after(2.0, 0.5).seen(math.nan)
    assert kept.steps == 0
    assert kept.after(2.0, math.inf).gain == 0.0


def test_a_checkpoint_has_all_of_it() -> None:
    kept = after([5.0, 4.0, 4.5], gain=1.0)[-1]
    state = HFState(damping=1.0, step=3, kept_gain=kept)
    assert HFState.restored(state.scalars(), None).kept_gain == kept
    old = {key: value for key, value in state.scalars().items() if key != "kept_gain"}
    assert HFState.restored(old, None).kept_gain == KeptGain()
