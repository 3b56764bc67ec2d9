"""Eigenvalue-corrected K-FAC beside its definition, written out with dense matrices."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cases import Case
from test_preconditioner_table import RELU, applied, built, probes, problem_of
from torch import Tensor

from hfdist.comm import SerialCommunicator
from hfdist.curvature.kronecker.blocks import factors_of
from hfdist.curvature.kronecker.eigen import (
    EigenBasis,
    Moments,
    eigenbases,
    eigenvectors,
    moments,
)
from hfdist.curvature.kronecker.factors import Factor
from hfdist.curvature.kronecker.keys import KroneckerKey, LayerBlock, Rows
from hfdist.curvature.kronecker.statistics import Sampling, take_statistics
from hfdist.curvature.loss_root import Random, loss_root, pulled_back
from hfdist.curvature.objective import Problem
from hfdist.curvature.preconditioners.memory import PreconditionerMemory


def second_moment(case: str | Case) -> Tensor:
    """F [P, P], the mean of (J's)(J's)' over examples, each in a pass of its own."""
    problem = problem_of(case, "none", sizes=(1,) * 6)
    problem.loss_and_gradient()
    total, weight = torch.zeros(problem.numel, problem.numel).double(), 0.0
    for part in problem.roles.gradient:
        e = problem.evaluate_split(part, nullcontext())
        root = loss_root(
            e, Random(part.example_seeds, part.seed), Random(part.example_seeds, part.seed, -1)
        )
        row = problem.params.flatten(list(pulled_back(root, problem.params.tensors)))
        total += torch.outer(row, row)
        weight += float(e.weight)
    return total * problem.scale(weight)


def places(problem: Problem, block: LayerBlock) -> Tensor:
    """Where the elements of [weight, bias] lie in a vector [P], as [out, in]."""
    pieces = problem.params.pieces(torch.arange(problem.numel))
    key = block.keys[0]
    W = pieces[key.rows.index][key.rows.start : key.rows.stop].flatten(1)
    if block.bias is None:
        return W
    b = pieces[block.bias.index][block.bias.start : block.bias.stop]
    return torch.cat((W, b[:, None]), 1)


@pytest.mark.parametrize("case", ["linear-ce", "linear-mse", "conv", "lstm", "encoder-padded"])
@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_blocks_are_the_second_moments_in_the_factors_eigenvectors(
    case: str, damping: float
) -> None:
    problem, M = built(case, "ekfac", damping, preconditioner_decay=0.0)
    inverse = torch.stack([M(row).clone() for row in torch.eye(problem.numel).double()])
    F = second_moment(case)
    plan, statistics, _ = take_statistics(problem, Sampling())
    weights = [block for block in plan.layers if not block.keys[0].is_one_hot]
    assert weights
    for block in weights:  # (of a table alone each use counts as an example)
        G, A = (f.blocks[0, 0] for f in factors_of(block, statistics))
        U = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        own = places(problem, block).flatten()
        diagonal = (U * (F[own][:, own] @ U)).sum(0)
        expected = (U / (diagonal + damping)) @ U.T
        torch.testing.assert_close(inverse[own][:, own], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("table_first", [False, True])
def test_a_weight_that_is_table_and_matrix_has_the_moments_of_both(table_first: bool) -> None:
    tokens, width, n, uses = 5, 3, 4, 2
    rows = Rows(0, 0, tokens)
    table = KroneckerKey(rows, tokens, width, input_first=True, is_one_hot=True)
    matrix = KroneckerKey(rows, width, tokens)
    keys = (table, matrix) if table_first else (matrix, table)
    sizes = (width, tokens) if table_first else (tokens, width)  # as the first key counts them
    basis = basis_of(*(random_factor(size) for size in sizes))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens, (n, uses), generator=generator)
    of_table, of_matrix, inputs = (
        torch.randn(n, uses, size, generator=generator).double() for size in (width, tokens, width)
    )
    found = moments(
        LayerBlock(keys), basis, {table: [[(ids, of_table)]], matrix: [[(inputs, of_matrix)]]}
    )

    def square(dW: Tensor) -> Tensor:  # of [tokens, width]
        V = (dW.T if table_first else dW)[None] / basis.scale[:, None, :]
        return basis.into(V).square()

    expected = torch.zeros_like(found)
    for k in range(n):
        expected += square(of_matrix[k].T @ inputs[k])
        expected += square(torch.zeros(tokens, width).double().index_add(0, ids[k], of_table[k]))
    torch.testing.assert_close(found, expected)


def test_it_is_nearer_to_the_second_moments_than_kfac_is() -> None:
    distance = {}
    for name in ("kfac", "ekfac"):
        problem, M = built(RELU, name, 1e-6, preconditioner_decay=0.0)
        inverse = torch.stack([M(row).clone() for row in torch.eye(problem.numel).double()])
        F = second_moment(RELU)
        own = places(problem, LayerBlock((KroneckerKey(Rows(0, 0, 3), 4, 3),), Rows(1, 0, 3)))
        own = own.flatten()
        block = torch.linalg.inv(inverse[own][:, own])
        distance[name] = float((block - F[own][:, own]).norm() / F[own][:, own].norm())
    assert distance["ekfac"] < distance["kfac"]


def test_a_basis_serves_several_steps_and_moments_follow_it_to_the_next() -> None:
    memory, kept = PreconditionerMemory(), []
    bases: list[int] = []
    for _ in range(5):
        problem = problem_of(RELU, "ekfac", memory=memory, ekfac_basis_refresh=2)
        problem.loss_and_gradient()
        problem.preconditioner(None)
        (first, *_) = memory.statistics.moments.values()
        bases.append(id(first.basis))
        kept.append(first)
    number = [bases.index(basis) for basis in bases]  # of the first step that had it
    assert number == [0, 0, 2, 2, 4]


def test_a_basis_of_a_metric_does_not_serve_for_a_damped_matrix() -> None:
    """In a metric the inputs have units of their own, in which damping is no diagonal."""
    memory = PreconditionerMemory()
    for damping in (None, 0.3):
        problem = problem_of(RELU, "ekfac", memory=memory)
        problem.loss_and_gradient()
        problem.preconditioner(damping)
    for own in memory.statistics.moments.values():
        assert torch.equal(own.basis.scale, torch.ones_like(own.basis.scale))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(steps: int) -> None:
    memory, options = PreconditionerMemory(), {"ekfac_basis_refresh": 2}
    for _ in range(steps):
        problem = problem_of(RELU, "ekfac", memory=memory, **options)
        problem.loss_and_gradient()
        problem.preconditioner(None)
    resumed = PreconditionerMemory()
    resumed.load_state_dict(memory.state_dict())
    found = []
    for own in (memory, resumed):
        problem = problem_of(RELU, "ekfac", memory=own, **options)
        problem.loss_and_gradient()
        M = problem.preconditioner(None)
        assert M is not None
        found.append(torch.stack([M(v).clone() for v in probes(problem.numel)]))
    assert torch.equal(*found)


def test_statistics_are_counted() -> None:
    """5/3 of a gradient for the factors; as much for moments in new eigenvectors, 1 in known ones."""
    memory, work = PreconditionerMemory(), []
    for _ in range(3):
        problem = problem_of(RELU, "ekfac", memory=memory, ekfac_basis_refresh=2)
        problem.loss_and_gradient()
        problem.preconditioner(None)
        work.append(problem.costs.metric)
    assert work == pytest.approx([10 / 3, 8 / 3, 10 / 3])


def block_of(out: int, inputs: int) -> LayerBlock:
    return LayerBlock((KroneckerKey(Rows(0, 0, out), inputs, out),))


def random_factor(n: int, max_size: int = 100, seed: int = 0) -> Factor:
    rows = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    return Factor.of_rows(rows, max_size=max_size)


def basis_of(G: Factor, A: Factor) -> EigenBasis:
    block = block_of(G.n, A.n)
    return eigenbases(SerialCommunicator(), {block: (G, A)}, is_metric=True)[block]


@pytest.mark.parametrize("max_size", [100, 3])
def test_a_basis_is_orthonormal_of_factors_in_blocks_too(max_size: int) -> None:
    """Of blocks that reach beyond n."""
    G, A = random_factor(4, max_size), random_factor(7, max_size)
    basis, V = basis_of(G, A), torch.randn(1, 4, 7).double()
    torch.testing.assert_close(basis.back(basis.into(V)), V)
    assert float(basis.into(V).norm()) == pytest.approx(float(V.norm()))


@pytest.mark.parametrize("max_size", [100, 3])
def test_moments_in_another_basis_are_the_diagonal_there(max_size: int) -> None:
    bases = [
        basis_of(random_factor(4, max_size, seed), random_factor(7, max_size, seed + 1))
        for seed in (0, 5)
    ]
    values = torch.rand(1, 4, 7).double()
    old = Moments(basis=bases[0], values=values)
    new = Moments(basis=bases[1], values=torch.rand(1, 4, 7).double())

    def matrix(basis: EigenBasis) -> Tensor:  # [28, 28], derivatives -> derivatives in the basis
        units = torch.eye(28).double().view(28, 1, 4, 7)
        rows = [basis.into(V / basis.scale[:, None, :]).flatten() for V in units]
        return torch.stack(rows, 1)

    T = matrix(bases[1]) @ torch.linalg.inv(matrix(bases[0]))
    expected = (T @ torch.diag(values.flatten()) @ T.T).diagonal().view(1, 4, 7)
    found = new.averaged(old, 3.0).values
    torch.testing.assert_close(found, (new.values + 3.0 * expected) / 4.0)


def test_without_eigenvectors_the_basis_is_the_parameters_own() -> None:
    broken = torch.full((2, 1, 3, 3), torch.nan)
    vectors, flat = eigenvectors(broken, 3)
    assert torch.equal(vectors, torch.eye(3).expand(2, 1, 3, 3))
    assert not flat.any()


def test_directions_are_flat_by_the_factors_own_size() -> None:
    """Not by what keeps the rows beyond n apart."""
    blocks = torch.diag_embed(torch.tensor([[[1.0, 1.0, 0.0], [1.0, 3e-6, 0.0]]]))
    _, flat = eigenvectors(blocks, 5)
    assert flat.tolist() == [[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]


def test_more_samples_and_shared_uses_are_taken_too() -> None:
    for changes in ({"preconditioner_samples": 2}, {"kfac_shared": "reduce"}):
        whole, cut = (
            applied("conv", "ekfac", None, sizes=sizes, **changes) for sizes in ((6,), (4, 2))
        )
        torch.testing.assert_close(cut, whole)
