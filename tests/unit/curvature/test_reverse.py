"""Vector-Jacobian products are torch's."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from hfdist.curvature.reverse import grad


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b, unused = (torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(3))
    return a, b, unused, (a.exp() * b).cumsum(1)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "more", [{"allow_unused": True}, {"materialize_grads": True}, {"is_grads_batched": True}]
)
def test_bits_are_torchs(create_graph: bool, more: dict[str, bool]) -> None:
    a, b, unused, z = example()
    seed = torch.randn(2, 3, 4) if "is_grads_batched" in more else torch.randn(3, 4)
    leaves = (a, b) if "is_grads_batched" in more else (a, b, unused)
    ours, theirs = (
        g(z, leaves, seed, create_graph=create_graph, retain_graph=True, **more)
        for g in (grad, torch.autograd.grad)
    )
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert torch.equal(x, y)
            assert x.requires_grad == y.requires_grad


def test_edges_and_several_outputs() -> None:
    a, b, _, z = example()
    edge, s, t = get_gradient_edge(z), torch.randn(3, 4), torch.randn(3)
    ours = grad([edge, a.sum(1)], [a, b], [s, t], retain_graph=True)
    theirs = torch.autograd.grad([z, a.sum(1)], [a, b], [s, t])
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("shape", [(4,), (3, 1), (2, 4)])
def test_a_cotangent_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    a, _, _, z = example()
    with pytest.raises(RuntimeError, match="shape"):
        grad(z, a, torch.ones(shape))


def test_batched_cotangents_of_another_shape_are_an_error() -> None:
    a, _, _, z = example()
    with pytest.raises(RuntimeError, match="shape"):
        grad(z, a, torch.ones(5, 3), is_grads_batched=True)


def test_an_unused_input_is_an_error() -> None:
    _, _, unused, z = example()
    with pytest.raises(RuntimeError, match="not have been used"):
        grad(z, unused, torch.ones(3, 4))
