"""Steps from steps: L-BFGS in the metric of the preconditioner, between the solves.

A solve learns the curvature by products. A step that was taken shows it, too, for nothing: along s the
gradient of the true loss changed by y = g(theta + s) - g(theta). From the last few pairs (s, y), and the
inverse metric C^-1 where they say nothing, L-BFGS (Nocedal & Wright 2006, sec. 7.2) makes a step for one
gradient and one loss. On a whole batch, which is the same in every step, many of these are
often worth more than the products of one solve: each moves on, and sees the landscape change.

A pair says nothing where the loss is another one in the next step (examples drawn anew, dropout): the loss
before a step is then not what it was after the last one, and all pairs are forgotten.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfdist.optim.space import Space

SAME = 100.0
"""Digits of the loss, in its dtype's precision, that two evaluations of one loss differ by at most."""
LEAST_CURVATURE = 1e-8
"""s'y in units of |s| |y| under which a pair is rounding, or bends the wrong way."""
WINDOW = 4
"""The last steps of a kind whose gain for their work counts."""
FIRST = 6
"""Solves that a run begins with: they find lambda, and what the metric's blocks are wrong by."""
WORTH = 0.5
"""Steps without products go on while they gain at least this part of what the last solve gained, for their
work."""
REFRESHED = 5
"""A diagonal metric is taken anew every so many steps without products: so cheap a step would mostly be
statistics otherwise. That of layers is by its work (`curvature.kronecker.pace`)."""


class Secants:
    """Pairs (s, y) of one run and what steps gained; the same on all ranks but for the parts of vectors."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []  # oldest first, [n] each
        self._products = np.zeros((0, 0))  # s_i'y_j
        self._b: Tensor | None = None  # minus the last step's gradient
        self._loss = math.nan  # after it
        self._moved = False
        self._is_whole = False  # vectors are not cut to this rank's parts
        self._solves = 0
        self._solve_gain = 0.0  # of the last one, for its work
        self._recent: list[tuple[float, float]] = []  # (gain, work) of the steps since then
        self.leads = False
        """This step is made of pairs."""

    def copy(self) -> Secants:
        """For going back to; shares vectors, which nothing writes to."""
        kept = copy.copy(self)
        kept._pairs, kept._recent = list(self._pairs), list(self._recent)
        return kept

    def cut(self, part: Callable[[Tensor], Tensor]) -> Secants:
        """Itself, with this rank's parts of whole vectors after `load_state_dict`."""
        if self._is_whole:
            self._pairs = [(part(s).clone(), part(y).clone()) for s, y in self._pairs]
            self._b = None if self._b is None else part(self._b).clone()
            self._is_whole = False
        return self

    def begin(self, b: Tensor, step: Tensor | None, loss: float, most: int, space: Space) -> None:
        """A new step: decide what it is made of.

        Args:
            b: Minus its gradient [n].
            step: The last step, if there was one [n]; kept, nothing may write to it.
            loss: The loss before it.
            most: Pairs to keep.
            space: How vectors lie over ranks.
        """
        eps = torch.finfo(b.dtype).eps
        is_same = abs(loss - self._loss) <= SAME * eps * abs(loss)  # False for NaN
        if not is_same or (self._b is not None and self._b.shape != b.shape):
            self._forget()
        elif self._moved and self._b is not None and step is not None:
            self._add(step, self._b - b, most, space)
        self._b, self._moved = b, False
        self.leads = bool(self._pairs) and self._is_worth_it()

    def direction(self, M: Callable[[Tensor], Tensor] | None, space: Space) -> tuple[Tensor, float]:
        """-H g [n], H the inverse BFGS matrix of the pairs on top of gamma C^-1, and its slope -g'H g.

        The recursion of two loops, with all dot products of vectors computed beforehand: two reductions.
        gamma = s'y / y'C^-1 y of the last pair [sec. 7.2].
        """
        b, m = self._b, len(self._pairs)
        assert b is not None
        steps, changes = zip(*self._pairs)
        Sb = np.array(space.dots(*((s, b) for s in steps)))
        SY = self._products  # s_i'y_j
        a = np.zeros(m)
        for i in range(m)[::-1]:
            a[i] = (Sb[i] - SY[i, i + 1 :] @ a[i + 1 :]) / SY[i, i]
        q = b.clone()
        for y, factor in zip(changes, a):
            q.add_(y, alpha=-float(factor))
        last = changes[-1]
        My = last if M is None else M(last).clone()
        r = q if M is None else M(q).clone()
        yMy, br, *Yr = space.dots((last, My), (b, r), *((y, r) for y in changes))
        gamma = SY[-1, -1] / yMy if yMy > 0.0 else 1.0
        r.mul_(gamma)
        c = np.zeros(m)
        for i in range(m):
            c[i] = a[i] - (gamma * Yr[i] + SY[:i, i] @ c[:i]) / SY[i, i]
        for s, factor in zip(steps, c):
            r.add_(s, alpha=float(factor))
        return r, float(gamma * br + Sb @ c)

    def after(self, gain: float, work: float, loss: float, moved: bool) -> None:
        """What the step came to.

        Args:
            gain: What it lowered the loss by.
            work: In gradients.
            loss: After it.
            moved: Whether it was taken.
        """
        self._loss, self._moved = loss, moved
        if not self.leads:
            self._solves += 1
            self._solve_gain, self._recent = gain / max(work, 1e-9), []
        else:
            # Where there was no way on, a solve is next.
            self._recent = [*self._recent[1 - WINDOW :], (gain, work)]
            if not moved:
                self._recent = [(0.0, work)] * WINDOW
        self.leads = False

    def _is_worth_it(self) -> bool:
        if self._solves < FIRST:
            return False
        if len(self._recent) < WINDOW:
            return True
        gain, work = (sum(numbers) for numbers in zip(*self._recent))
        return gain > 0.0 and gain >= WORTH * self._solve_gain * work

    def _add(self, s: Tensor, y: Tensor, most: int, space: Space) -> None:
        dropped = max(len(self._pairs) + 1 - most, 0)
        pairs, kept = self._pairs[dropped:], self._products[dropped:, dropped:]
        k = len(pairs)
        found = space.dots(
            (s, s), (y, y), (s, y), *((s, v) for _, v in pairs), *((u, y) for u, _ in pairs)
        )
        ss, yy, sy = found[:3]
        if not all(map(math.isfinite, found)) or sy <= LEAST_CURVATURE * math.sqrt(ss * yy):
            return
        products = np.empty((k + 1, k + 1))
        products[:k, :k], products[k, k] = kept, sy
        products[k, :k], products[:k, k] = found[3 : 3 + k], found[3 + k :]
        self._pairs, self._products = [*pairs, (s, y)], products

    def _forget(self) -> None:
        self._pairs, self._products = [], np.zeros((0, 0))

    def state_dict(self, whole: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Plain data and tensors; empty where the next step needs nothing of it.

        Args:
            whole: This rank's part of a vector -> the whole one. Collective.
        """
        if self._b is None:
            return {}
        own = (lambda v: v) if self._is_whole else whole
        return {
            "pairs": [[own(s), own(y)] for s, y in self._pairs],
            "products": self._products.tolist(),
            "b": own(self._b),
            "loss": self._loss,
            "moved": self._moved,
            "solves": self._solves,
            "solve_gain": self._solve_gain,
            "recent": [list(seen) for seen in self._recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; from nothing, as at the start of a run."""
        self._pairs = [(s, y) for s, y in state.get("pairs", [])]
        k = len(self._pairs)
        self._products = np.array(state.get("products", []), dtype=float).reshape(k, k)
        self._b, self._loss = state.get("b"), float(state.get("loss", math.nan))
        self._moved = bool(state.get("moved", False))
        self._solves, self._solve_gain = state.get("solves", 0), state.get("solve_gain", 0.0)
        self._recent = [(gain, work) for gain, work in state.get("recent", [])]
        self._is_whole, self.leads = True, False
