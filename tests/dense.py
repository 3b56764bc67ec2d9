"""Curvature matrices written out in full, by loops over autograd: the truth that products are held to.

Nothing here comes from hfdist. A `Function` is one microbatch: outputs z(theta), loss sum L(z), weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Function:
    """One microbatch as a function of the parameters."""

    outputs: Callable[[], list[Tensor]]
    """Forward pass: the differentiable output tensors, with a graph."""
    loss: Callable[[list[Tensor]], tuple[Tensor, float]]
    """(sum of the losses, weight) of such outputs."""


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """[P] float64."""
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64)
            if t is None
            else t.detach().double().reshape(-1)
            for t, p in zip(tensors, like)
        ]
    )


def loss(functions: Sequence[Function]) -> float:
    """Global mean."""
    pairs = [f.loss(f.outputs()) for f in functions]
    return sum(s.item() for s, _ in pairs) / sum(w for _, w in pairs)


def gradient(functions: Sequence[Function], params: Sequence[Tensor]) -> Tensor:
    """[P] float64, of the global mean."""
    total = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    weight = 0.0
    for f in functions:
        loss_sum, w = f.loss(f.outputs())
        total += flat(torch.autograd.grad(loss_sum, params, allow_unused=True), params)
        weight += w
    return total / weight


def jacobian(z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """dz/dtheta [M, P] float64, a row at a time."""
    rows = [
        flat(torch.autograd.grad(zi, params, retain_graph=True, allow_unused=True), params)
        for zi in z.reshape(-1)
    ]
    return torch.stack(rows)


def loss_hessian(f: Function, z: Sequence[Tensor]) -> tuple[Tensor, float]:
    """d2L/dz2 [M, M] float64 of all outputs together, and the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in z]
    loss_sum, weight = f.loss(leaves)
    g = torch.autograd.grad(loss_sum, leaves, create_graph=True, allow_unused=True)
    rows = []
    for k, t in enumerate(leaves):
        gk = g[k]
        for i in range(t.numel()):
            if gk is None or not gk.requires_grad:
                rows.append(flat([None] * len(leaves), leaves))
                continue
            row = torch.autograd.grad(
                gk.reshape(-1)[i], leaves, retain_graph=True, allow_unused=True
            )
            rows.append(flat(row, leaves))
    return torch.stack(rows), weight


def ggn(functions: Sequence[Function], params: Sequence[Tensor]) -> Tensor:
    """Generalized Gauss-Newton matrix J' H_L J of the global mean, [P, P] float64."""
    P = sum(p.numel() for p in params)
    G, weight = torch.zeros(P, P, dtype=torch.float64), 0.0
    for f in functions:
        z = f.outputs()
        J = torch.cat([jacobian(t, params) for t in z])  # [M, P]
        H, w = loss_hessian(f, z)  # [M, M]
        G += J.T @ H @ J
        weight += w
    return G / weight


def hessian(functions: Sequence[Function], params: Sequence[Tensor]) -> Tensor:
    """Hessian of the global mean, [P, P] float64."""
    P = sum(p.numel() for p in params)
    H, weight = torch.zeros(P, P, dtype=torch.float64), 0.0
    for f in functions:
        loss_sum, w = f.loss(f.outputs())
        weight += w
        g = torch.autograd.grad(loss_sum, params, create_graph=True, allow_unused=True)
        start = 0
        for gk, p in zip(g, params):
            for i in range(p.numel()):
                if gk is not None and gk.requires_grad:
                    row = torch.autograd.grad(
                        gk.reshape(-1)[i], params, retain_graph=True, allow_unused=True
                    )
                    H[start + i] += flat(row, params)
            start += p.numel()
    return H / weight


class Residuals:
    """r + Jx, as least-squares solvers ask for it, with J [N, P] and r [N] written out."""

    weight_decay = 0.0

    def __init__(self, J: Tensor, r: Tensor) -> None:
        self.J, self.r = J, r
        self.num_residuals = len(r)

    def residuals(self) -> Tensor:
        return self.r

    def gradient(self) -> Tensor:
        return self.J.T @ self.r

    def gram(self) -> Tensor:
        return self.J.T @ self.J

    def kernel(self) -> Tensor:
        return self.J @ self.J.T

    def kernel_times(self, w: Tensor) -> Tensor:
        return self.J @ (self.J.T @ w)

    def times(self, v: Tensor) -> Tensor:
        return self.J @ v

    def transposed_times(self, w: Tensor) -> Tensor:
        return self.J.T @ w

    def remainder(self, v: Tensor, Jv: Tensor | None = None) -> Tensor:
        return torch.zeros_like(self.r)
