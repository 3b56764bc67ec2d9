"""Random programs of operations, views, writes, masks and losses, against dense matrices in float64."""

from __future__ import annotations

import dense
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from programs import Net, Program, ProgramTask, data, program
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector

SETTINGS = settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
# Shrinking takes longer than a fast test may; make soak does it.
FAST = settings(SETTINGS, derandomize=True, phases=(Phase.generate,))
SEED, LENGTH = st.integers(0, 2**32 - 1), st.integers(2, 8)


@settings(FAST, max_examples=200)
@given(SEED, LENGTH)
def test_random_programs(seed: int, length: int) -> None:
    check(program(seed, length))


@settings(FAST, max_examples=60)
@given(SEED, LENGTH)
def test_random_programs_whose_loss_reads_parameters(seed: int, length: int) -> None:
    check(program(seed, length, with_parameters=True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=5000)
@given(SEED, LENGTH)
def test_many_random_programs(seed: int, length: int) -> None:
    check(program(seed, length))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=1000)
@given(SEED, LENGTH)
def test_many_random_programs_whose_loss_reads_parameters(seed: int, length: int) -> None:
    check(program(seed, length, with_parameters=True))


REFUSED_BY_TORCH = (
    "modified by an inplace operation",  # a value that a backward pass needs
    "is a view and",  # one of several views that one operation made
    "refer to a single memory location",
    "does not require grad",  # nothing is left that depends on the parameters
)


def check(program: Program) -> None:
    """Loss, gradient and product are those of the dense matrices, or torch itself refuses the program."""
    note(str(program))
    net, batch = Net(program), data()
    params = list(net.parameters())
    try:
        function = reference(program, net, batch)
        expected_loss = dense.loss([function])
        g = dense.gradient([function], params)
        G = None if program.uses_parameters else dense.ggn([function], params)
    except RuntimeError as error:
        assume(not any(reason in str(error) for reason in REFUSED_BY_TORCH))
        raise
    size = float(g.norm()) if G is None else float(g.norm() + G.norm())
    assume(size < 1e6)  # and no NaN

    problem = problem_of(program, net, batch)
    got_loss, got = problem.loss_and_gradient()
    assert got_loss == pytest.approx(expected_loss, rel=1e-10, abs=1e-12)
    close(got, g)
    B = problem.curvature()
    v, u = torch.randn(2, len(g), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    Bv, Bu = B(v.clone()).clone(), B(u.clone()).clone()
    if G is not None:
        close(Bv, G @ v)
        close(Bu, G @ u)
    assert torch.equal(B(v.clone()), Bv), "a product must not change the next one"
    assert float(u @ Bv) == pytest.approx(float(v @ Bu), rel=1e-7, abs=1e-9 * (1 + size))
    delta = -0.01 * g / (1 + g.norm())
    (candidate,) = problem.losses([(1.0, delta)])
    with torch.no_grad():
        for p, piece in zip(params, delta.split([p.numel() for p in params])):
            p.add_(piece.view(p.shape))
    assert candidate == pytest.approx(dense.loss([function]), rel=1e-10, abs=1e-12)


def reference(program: Program, net: Net, batch: dict[str, Tensor]) -> dense.Function:
    """The program in the terms of `dense`: z are the differentiable tensors of what the model returns."""
    task = ProgramTask(program, net)
    leaves, spec = tree_flatten(net(batch))
    places = [k for k, leaf in enumerate(leaves) if leaf.requires_grad]

    def outputs() -> list[Tensor]:
        now, _ = tree_flatten(net(batch))
        return [now[k] for k in places]

    def loss(z: list[Tensor]) -> tuple[Tensor, float]:
        whole = list(leaves)
        for k, t in zip(places, z):
            whole[k] = t
        return task.loss(tree_unflatten(whole, spec), batch), 1.0

    return dense.Function(outputs=outputs, loss=loss)


def problem_of(program: Program, net: Net, batch: dict[str, Tensor]) -> Problem:
    role = [from_task(ProgramTask(program, net), net, batch, 0)]
    return Problem(
        params=ParameterVector(net.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(torch.device("cpu"), net),
    )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max() + 1e-2)
    )
