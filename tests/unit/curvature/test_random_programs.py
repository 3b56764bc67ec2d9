"""Random programs of operations, views, writes, masks and losses, against dense matrices in float64."""

from __future__ import annotations

from typing import Literal

import dense
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from programs import Net, Program, ProgramTask, data, program
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hfdist.curvature.engines import ProductEngine
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.microbatch import from_task
from hfdist.curvature.objective import Problem, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.verify import Verifier

SETTINGS = settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
# Shrinking takes longer than a fast test may; make soak does it.
FAST = settings(SETTINGS, derandomize=True, phases=(Phase.generate,))
SEED, LENGTH = st.integers(0, 2**32 - 1), st.integers(2, 8)


@settings(FAST, max_examples=100)
@given(SEED, LENGTH)
def test_random_programs(seed: int, length: int) -> None:
    check(program(seed, length))


@settings(FAST, max_examples=40)
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
    "a leaf Variable that requires grad",  # a view that was emptied and filled
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
        assume(function.outputs())  # a model that depends on no parameter is refused
        loss = dense.loss([function])
        g = dense.gradient([function], params)
        G = dense.ggn([function], params)
    except RuntimeError as error:
        assume(not any(reason in str(error) for reason in REFUSED_BY_TORCH))
        raise
    assume(float(g.norm() + G.norm()) < 1e6)  # and no NaN

    # The checks of a first solve might hide a wrong product, and refuse what stops gradients.
    problem = problem_of(program, net, batch, "off")
    got_loss, got_g = problem.loss_and_gradient()
    assert got_loss == pytest.approx(loss, rel=1e-10, abs=1e-12)
    close(got_g, g)
    B = problem.curvature()
    got = torch.stack([B(column).clone() for column in torch.eye(len(g), dtype=g.dtype)], 1)
    assert torch.equal(B(torch.eye(len(g), dtype=g.dtype)[0]), got[:, 0]), "products change"
    if program.uses_parameters:
        # The rule of hfdist.curvature.direct adds a positive semi-definite part; of losses that mix outputs
        # with parameters the whole matrix is one, where the loss is convex in the outputs.
        direct = got - G
        close(direct, direct.T, like=got)
        size = float(direct.norm() + 1e-6 * (1 + got.norm()))
        if _least(G) >= -1e-9 * (1 + float(G.norm())):
            assert max(_least(direct), _least(got)) >= -1e-7 * size
    else:
        close(got, G)

    if not program.stops_gradients and _has_its_gradient(function, params, g):
        checked = problem_of(program, net, batch, "always")
        close(checked.loss_and_gradient()[1], g)
        assert checked.product_engine == problem.product_engine, "a right product is not used"

    delta = -0.01 * g / (1 + g.norm())
    (candidate,) = problem.losses([(1.0, delta)])
    with torch.no_grad():
        for p, piece in zip(params, delta.split([p.numel() for p in params])):
            p.add_(piece.view(p.shape))
    assert candidate == pytest.approx(dense.loss([function]), rel=1e-10, abs=1e-12)


def _has_its_gradient(function: dense.Function, params: list[Tensor], g: Tensor) -> bool:
    """Whether torch's gradient is the loss's: not where an operation in place reads what it writes, and then
    the checks refuse it."""
    d = torch.randn(len(g), generator=torch.Generator().manual_seed(5), dtype=g.dtype)
    losses = []
    for step in (1e-6, -2e-6, 1e-6):  # and back
        losses.append(dense.loss([function]))
        with torch.no_grad():
            for p, piece in zip(params, d.split([p.numel() for p in params])):
                p.add_(piece.view(p.shape), alpha=step)
    return abs((losses[1] - losses[2]) / 2e-6 - float(g @ d)) < 1e-3 * float(g.norm() * d.norm())


def _least(matrix: Tensor) -> float:
    """Least eigenvalue."""
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def reference(program: Program, net: Net, batch: dict[str, Tensor]) -> dense.Function:
    """The program in the terms of `dense`: z are the differentiable tensors of what the model returns."""
    task = ProgramTask(program, net)
    leaves, spec = tree_flatten(net(batch))
    places = [k for k, leaf in enumerate(leaves) if leaf.requires_grad]

    def outputs() -> list[Tensor]:
        leaves[:], _ = tree_flatten(net(batch))
        return [leaves[k] for k in places]

    def loss(z: list[Tensor]) -> tuple[Tensor, float]:
        whole = list(leaves)
        for k, t in zip(places, z):
            whole[k] = t
        return task.loss(tree_unflatten(whole, spec), batch), 1.0

    return dense.Function(outputs=outputs, loss=loss)


def problem_of(
    program: Program, net: Net, batch: dict[str, Tensor], verify: Literal["off", "always"]
) -> Problem:
    role = [from_task(ProgramTask(program, net), net, batch, 0)]
    return Problem(
        params=ParameterVector(net.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(torch.device("cpu"), net),
        engine=ProductEngine(verifier=Verifier(mode=verify)),
    )


def close(got: Tensor, expected: Tensor, like: Tensor | None = None) -> None:
    """Equal but for rounding in numbers of the size of `like`, by default of what is expected."""
    size = float((expected if like is None else like).abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9 * (size + 1e-2))
