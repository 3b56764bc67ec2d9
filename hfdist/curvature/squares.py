"""Whether a loss is a sum of squares whose rows come from one backward pass: told by a few examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.jacobian_rows import RowMethod, UseWatch, jacobian_rows
from hfdist.curvature.kronecker.recurrent import StepByStep
from hfdist.curvature.least_squares import agrees, is_diagonal
from hfdist.curvature.microbatch import Evaluation, LossTraits, Microbatch, TryAgain
from hfdist.curvature.reverse import grad

logger = logging.getLogger(__name__)

EXAMPLES = 7
"""Of the trial. Few layers are of such a size, so that dimensions of examples are told from others."""


def is_sum_of_squares(
    make: Callable[[int], Microbatch], tensors: Sequence[Tensor], fixed: FixedRandomness
) -> bool:
    """Whether the loss is a sum of squares, of calls of `mse_loss`, one for each number of a single output
    tensor, and nothing else of the parameters; outputs draw no random numbers; and examples do not interact.

    The same answer on every rank that asks of the same examples, and whenever it is asked of the same
    parameters. Where anything fails the answer is no.

    Args:
        make: Seed -> the same few examples.
        tensors: The parameters.
        fixed: Of the model.
    """
    try:
        return _is(make, tensors, fixed)
    except Exception as error:  # a task's own code, under a watch that it may not bear
        logger.debug("the loss is taken for no sum of squares: %s", error)
        return False


def _is(
    make: Callable[[int], Microbatch], tensors: Sequence[Tensor], fixed: FixedRandomness
) -> bool:
    traits = LossTraits()
    e, watch = _evaluated(make(0), traits, tensors, fixed)
    if traits.is_whole or len(e.outputs) != 1:
        return False
    z, leaf = e.outputs[0], e.loss_inputs[0]
    H = e.closed_form()
    if H is None or not H.is_squares or not is_diagonal(H, z):
        return False
    (dz, *others) = grad(e.loss_sum, [leaf, *tensors], retain_graph=True, allow_unused=True)
    if any(g is not None for g in others):
        return False  # an L2 term of the loss's own, say
    other, _ = _evaluated(make(1), traits, tensors, fixed)
    pairs = ((other.outputs[0], z), (other.loss_sum, e.loss_sum))
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs):
        return False  # dropout: residuals of every step's own
    root = H([torch.ones_like(z)])[0].detach().reshape(-1).sqrt()
    method = RowMethod()
    J = jacobian_rows(z, watch.finish(), tensors, method, root)
    r = torch.where(root > 0, dz.detach().reshape(-1) / root, 0.0)
    back = grad(z, tensors, dz, retain_graph=True, allow_unused=True)
    flat = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, back)]
    return method.per_example and agrees(J, r, torch.cat([g.reshape(-1) for g in flat]))


def _evaluated(
    microbatch: Microbatch,
    traits: LossTraits,
    tensors: Sequence[Tensor],
    fixed: FixedRandomness,
) -> tuple[Evaluation, UseWatch]:
    while True:
        watch = UseWatch(tensors, microbatch.num_examples)
        try:
            with torch.enable_grad(), fixed.evaluation(microbatch.seed), StepByStep():
                return microbatch.evaluate(traits, watch), watch
        except TryAgain:
            continue
