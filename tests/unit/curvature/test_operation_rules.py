"""Every rule of linearization against the Jacobian of its operation, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfdist.curvature.linearize import Recorder
from hfdist.curvature.linearize.program import Program
from hfdist.curvature.linearize.rules import RULES

Function = Callable[[Tensor, Tensor], Any]  # of x [2, 3, 4] and y [2, 3, 4], both with tangents

MASK = torch.tensor([True, False, True, True])
INDEX = torch.tensor([2, 0, 2])


def _written_after_a_copy(x: Tensor, y: Tensor) -> Tensor:
    """The copy's tangent is the original's, which is read again."""
    k = x * 1.5
    h = torch.zeros_like(x).copy_(k)
    h.cumsum_(1).neg_().tril_().triu_(-1)
    return h + k


def _turned_in_place(x: Tensor, y: Tensor) -> Tensor:
    k = x * 1.5
    h = torch.zeros_like(x).copy_(k)
    h.transpose_(0, 1).unsqueeze_(0)
    return h[0].transpose(0, 1) + k


FUNCTIONS: dict[str, Function] = {
    "written after a copy": _written_after_a_copy,
    "turned in place": _turned_in_place,
    # rearrangements
    "view": lambda x, y: x.view(6, 4) + 0,
    "permute": lambda x, y: x.permute(2, 0, 1).reshape(4, 6),
    "slices": lambda x, y: x[:, 1:, ::2].transpose(0, 1),
    "expand": lambda x, y: x.sum(0, keepdim=True).expand(5, 3, 4),
    "split": lambda x, y: x.split([1, 3], dim=2)[1] * y.unbind(2)[0][..., None],
    "chunk": lambda x, y: x.chunk(2, dim=2)[0],
    "cat": lambda x, y: torch.cat([x, torch.ones(2, 1, 4, dtype=x.dtype), y], 1),
    "stack": lambda x, y: torch.stack([x, y.detach(), y], 1),
    "diagonal": lambda x, y: x[0].diagonal() + x[0, :, :3].t().diagonal(),
    "overlapping-windows": lambda x, y: (x * 2.0).unfold(2, 2, 1).tanh().square(),
    "overlapping-strides": lambda x, y: (x * 2.0).as_strided((2, 3, 3), (12, 2, 1)).sin() * 2,
    "windows": lambda x, y: x.unfold(2, 2, 1).sum(-1) + F.unfold(y[:, None], 2).sum(),
    "folded": lambda x, y: F.fold(x[:, :2].reshape(1, 4, 4), (3, 3), 2),
    "repeat": lambda x, y: x.repeat(1, 2, 1).triu(),
    "unsafe-splits": lambda x, y: (
        torch.unsafe_chunk(x, 2, 2)[1] * torch.unsafe_split(y, 2, 2)[0]
        + torch.unsafe_split_with_sizes(x, [2, 2], 2)[1]
    ),
    "reflect": lambda x, y: (
        F.pad(x, (1, 1), mode="reflect").sum() * F.pad(y[None], (1, 1, 1, 1), mode="reflect")
    ),
    "flip-roll": lambda x, y: x.flip(1).roll(1, 2),
    "gather": lambda x, y: x.gather(2, torch.zeros(2, 3, 2, dtype=torch.long)),
    "index_select": lambda x, y: x.index_select(1, INDEX),
    "index": lambda x, y: x[:, INDEX],
    "masked": lambda x, y: x.masked_fill(MASK, 3.0),
    "where": lambda x, y: torch.where(MASK, x, y) + torch.where(MASK, x, 1.0),
    "pad": lambda x, y: F.pad(x, (1, 2)) * F.pad(y, (2, 1), value=0.7),
    "tril": lambda x, y: x.tril(),
    "cumsum": lambda x, y: x.cumsum(1),
    "copy": lambda x, y: torch.zeros_like(x).copy_(x),
    "index_put": lambda x, y: torch.zeros_like(x).index_put((torch.tensor([1]),), y[:1]),
    "to": lambda x, y: x.float().double() * 0 + x,
    # sums and products
    "add": lambda x, y: torch.add(x, y, alpha=3) + 1.0,
    "add-broadcast": lambda x, y: x[:, :1] + y[:1],
    "sub": lambda x, y: torch.sub(x, y, alpha=2) - y[0],
    "rsub": lambda x, y: 2.0 - x + torch.rsub(x, y, alpha=2),
    "mul": lambda x, y: x * y * 2.0,
    "mul-broadcast": lambda x, y: x[:, :1] * y[:1] * torch.ones(2, 1, 1, dtype=x.dtype),
    "square-by-mul": lambda x, y: x * x,
    "div": lambda x, y: x / (y.square() + 1) + 1.0 / (x.square() + 1) + x / 3,
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "mean": lambda x, y: x.mean((0, 2)) + x.sum(),
    "mm": lambda x, y: x[0] @ y[1].T,
    "mm-left": lambda x, y: x[0] @ y[1].T.detach(),
    "mm-right": lambda x, y: x[0].detach() @ y[1].T,
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    "addcmul-start": lambda x, y: torch.addcmul(x, y, y, value=0.3),
    "addmm": lambda x, y: torch.addmm(x[0, :, :3], x[0], y[1].T, beta=0.5),
    "addmm-bias": lambda x, y: torch.addmm(x[0, :, :3], x[0].detach(), y[1].T.detach()),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, :, :3], x, y.transpose(1, 2)),
    "mv-dot": lambda x, y: (x[0] @ y[0, 0]) * torch.dot(x[0, 0], y[1, 1]),
    "conv1d": lambda x, y: F.conv1d(x, y[:, :, :2], x[0, 0, :2], padding=1),
    "conv1d-input": lambda x, y: F.conv1d(x, y[:, :, :2].detach()),
    "conv-bias": lambda x, y: F.conv1d(x.detach(), y[:, :, :2].detach(), x[0, 0, :2]),
    "conv2d-grouped": lambda x, y: F.conv2d(x[None, :], y[:, :1, None, :2], groups=2),
    "conv-transposed": lambda x, y: F.conv_transpose1d(x, y[0, :, None, :3].contiguous(), stride=2),
    # element by element
    **{
        f.__name__: (lambda x, y, f=f: f(x) * 2)
        for f in (
            torch.relu, torch.sigmoid, torch.tanh, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
            F.softplus, F.leaky_relu, F.elu, F.selu, F.relu6, F.hardtanh, F.logsigmoid, F.celu,
            F.softsign, torch.exp, torch.sin, torch.cos, torch.abs, torch.erf, torch.expm1, torch.atan,
            torch.square, torch.neg,
        )
    },
    "gelu-tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "softplus-beta": lambda x, y: F.softplus(x, beta=2.0, threshold=1.0),
    "positive": lambda x, y: (
        (x.square() + 0.5).log() + (y.abs() + 0.1).sqrt() + (x.square() + 1).rsqrt()
        + (y.square() + 1).reciprocal() + (x.square() + 1).log1p() + (y.square() + 1).log2()
    ),
    "pow": lambda x, y: x.pow(3) + y.pow(2) + (x.square() + 1).pow(-0.5),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5) + y.clamp(min=0.1) + x.clamp_max(0.2),
    "in-place": lambda x, y: (x * 1.0).mul_(2.0).add_(y).div_(3.0).tanh_(),
    "in-place-both": lambda x, y: (x * 1.0).mul_(y),
    "dropout-p0": lambda x, y: F.dropout(x, 0.0, training=True),
    # layers
    "softmax": lambda x, y: x.softmax(1),
    "log_softmax": lambda x, y: x.log_softmax(-1),
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), y[0, 0], y[0, 1]),
    "layer_norm-plain": lambda x, y: F.layer_norm(x, (3, 4)),
    "layer_norm-affine": lambda x, y: F.layer_norm(x.detach(), (4,), y[0, 0], y[0, 1]),
    "layer_norm-bias": lambda x, y: F.layer_norm(x.detach(), (4,), None, y[0, 1]),
    "group_norm": lambda x, y: F.group_norm(x.permute(0, 2, 1), 2, y[0, 0], y[0, 1]),
    "batch_norm": lambda x, y: F.batch_norm(x, None, None, y[0, :, 0], y[0, :, 1], training=True),
    "batch_norm-plain": lambda x, y: F.batch_norm(x, None, None, training=True),
    "batch_norm-eval": lambda x, y: F.batch_norm(
        x, torch.ones(3, dtype=x.dtype), 2 * torch.ones(3, dtype=x.dtype), y[0, :, 0], y[0, :, 1]
    ),
    "batch_norm-affine": lambda x, y: F.batch_norm(
        x.detach(), None, None, y[0, :, 0], y[0, :, 1], training=True
    ),
    "max_pool": lambda x, y: F.max_pool2d(x[None], 2),
    "avg_pool": lambda x, y: F.avg_pool2d(x[None], 2) + F.adaptive_avg_pool2d(y[None], 1),
    "max_pool3d": lambda x, y: F.max_pool3d(x[None, None], 2),
    "mean-pools": lambda x, y: (
        F.avg_pool1d(x, 2).sum() + F.avg_pool3d(y[None, None], 2)
        + F.adaptive_avg_pool3d(x[None, None], (1, 2, 2)) + F.adaptive_avg_pool2d(y, (2, 2)).sum()
    ),
    "dropout": lambda x, y: F.dropout(x, 0.5) + torch.native_dropout(y, 0.5, True)[0],
    "upsample": lambda x, y: F.interpolate(x, scale_factor=2),
    "upsample2d": lambda x, y: (
        F.interpolate(x[None], scale_factor=2, mode="bilinear").sum() * F.interpolate(y[None], (6, 6))
    ),
    "upsample3d": lambda x, y: F.interpolate(x[None, None], (2, 4, 4)),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, x + y),
    "embedding": lambda x, y: F.embedding(torch.tensor([[0, 2], [1, 1]]), x[0]),
    "embedding-padding": lambda x, y: F.embedding(torch.tensor([0, 2]), x[0], padding_idx=0),
    # without a rule
    "logsumexp": lambda x, y: x.logsumexp(1),
    "prod": lambda x, y: x.prod(2),
    "cdist": lambda x, y: torch.cdist(x, y),
    "sort": lambda x, y: x.sort(-1)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_are_those_of_the_jacobian(name: str) -> None:
    for constant in (None, "x", "y"):
        torch.manual_seed(0)
        x, y = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in "xy")
        tangents = [t.requires_grad_() for n, t in (("x", x), ("y", y)) if n != constant]
        _check(FUNCTIONS[name], x, y, tangents)


def _check(function: Function, x: Tensor, y: Tensor, variables: list[Tensor]) -> None:
    recorder = Recorder(variables)
    with recorder, sdpa_kernel(SDPBackend.MATH):
        z = function(x, y)
        z = z * 1.0  # more often than not, tangents go on
    if not z.requires_grad:
        return
    program = recorder.program([z])
    v = [torch.randn_like(t) for t in variables]
    assert not _shares_silently(program, v), "its result lies in its argument, and nobody knows"
    before = [t.clone() for t in v]
    (Jv,) = program(v)
    expected = dense.jacobian(z, variables) @ dense.flat(v, v)
    assert Jv is not None
    assert Jv.shape == z.shape
    torch.testing.assert_close(Jv.reshape(-1), expected, rtol=1e-10, atol=1e-10)
    (again,) = program(v)
    assert torch.equal(Jv, again), "what a rule keeps must not change"
    assert all(torch.equal(a, b) for a, b in zip(v, before)), "v is not a rule's to write into"


def _shares_silently(program: Program, v: list[Tensor]) -> set[str]:
    """Operations whose tangent lies in an argument's memory though nobody gave it that, and that do not say
    so: a write into the one would change the other."""
    found: set[str] = set()
    slots: dict[int, Tensor] = dict(enumerate(v))
    for step in program.steps:
        inputs = [slots[i] for i in step.inputs]
        results = step.map(inputs, [False] * len(inputs))
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        slots.update((slot, t) for slot, t in zip(step.outputs, results) if t is not None)
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        shares = any(t.untyped_storage().data_ptr() in memory for t in results if t is not None)
        found |= {step.name} if shares and not step.aliases else set()
    return found


def test_every_rule_is_tried() -> None:
    """A rule that no function above uses is a rule nobody has checked."""
    used: set[str] = set()

    class Noting(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            used.add(key)
            return super().get(key, default)

    from hfdist.curvature.linearize import recorder as module

    original = module.RULES
    module.RULES = Noting(original)
    try:
        for name in FUNCTIONS:
            test_tangents_are_those_of_the_jacobian(name)
    finally:
        module.RULES = original
    untried = {name.removeprefix("aten::") for name in set(RULES) - used}
    assert untried <= ALIASES, f"untried: {sorted(untried - ALIASES)}"


ALIASES = {"_reshape_alias", "alias", "cudnn_batch_norm", "clamp_min", "square"}
"""Operations that only other devices, versions or layers use, with a rule they share with a tried one."""
