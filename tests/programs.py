"""Random programs: forward passes and losses as source text.

A statement takes variables of fixed shapes and either defines a new one or writes into its first one, so
that views, writes through views and values read before or after a write meet in every order. What torch
itself refuses (a value that a backward pass needs was overwritten) is no program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfdist.tasks.task import Task

ROWS, COLUMNS = 3, 4


@dataclass(frozen=True, kw_only=True)
class Program:
    """Source of a forward pass that ends with `z` [3, 4], and of a loss that ends with `loss`."""

    forward: str
    loss: str
    outputs: str
    """What the model returns, an expression."""
    opened: str
    """Statements of the loss that take z (and u, a second output) out of `outputs`."""
    uses_parameters: bool
    """Whether the loss reads parameters itself."""

    @property
    def stops_gradients(self) -> bool:
        """Whether its gradient is not the derivative of its loss."""
        return "detach" in str(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                "# a [4, 4], b [4], c [3, 4]: parameters; x, y, p, t, k, w: data",
                self.forward,
                f"outputs = {self.outputs}",
                "# loss",
                self.opened,
                self.loss,
            ]
        )


class Net(nn.Module):
    """The parameters, and a program's forward pass over them."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("a", (4, 4)), ("b", (4,)), ("c", (3, 4))):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))
        self._run = _compiled(program.forward, program.outputs)

    def forward(self, data: dict[str, Tensor]) -> Any:
        return self._run(_own(data) | dict(self.named_parameters()))


class ProgramTask(Task):
    """A program as a task; the loss reads the network's parameters where the program says so."""

    def __init__(self, program: Program, net: Net) -> None:
        self._net = net
        self._loss = _compiled(f"{program.opened}\n{program.loss}", "loss")

    def model(self) -> nn.Module:
        return self._net

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        names = _own(batch) | dict(self._net.named_parameters()) | {"outputs": outputs}
        return self._loss(names)


def _own(batch: Any) -> dict[str, Any]:
    """A copy, which a program may write into: the next pass would see what it writes into the batch."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in dict(batch).items()}


def data() -> dict[str, Tensor]:
    """x: input, y: classes, p: probabilities, t: targets, k: mask [3, 4], w: weights [4]."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(ROWS, COLUMNS),
        "y": torch.randint(COLUMNS, (ROWS,), generator=generator),
        "p": normal(ROWS, COLUMNS).softmax(1),
        "t": normal(ROWS, COLUMNS).sigmoid(),
        "k": normal(ROWS, COLUMNS) > 0,
        "w": normal(COLUMNS).exp(),
    }


def _compiled(source: str, result: str) -> Callable[[dict[str, Any]], Any]:
    code = compile(f"{source}\nresult__ = {result}", "<program>", "exec")

    def run(names: dict[str, Any]) -> Any:
        scope = {"torch": torch, "F": F} | names
        exec(code, scope)
        return scope["result__"]

    return run


# -- statements ------------------------------------------------------------------------------------

# (source, shapes of what it takes, shape of what it defines or None where it writes into the first one).
# Shapes: M [3, 4], T [4, 3], H [3, 2], R [4], C [3, 1].
_Statement = tuple[str, str, str | None]
_NEW: tuple[_Statement, ...] = (
    # element by element
    ("torch.tanh({0})", "M", "M"), ("{0}.sigmoid()", "M", "M"), ("F.gelu({0})", "M", "M"),
    ("torch.relu({0})", "M", "M"), ("({0} * {0} + 0.5).log()", "M", "M"),
    ("({0} * 0.3).exp()", "M", "M"), ("1 / ({0}.square() + 1)", "M", "M"),
    ("{0}.clamp(-0.7, 0.9)", "M", "M"), ("({0}.square() + 1) ** 0.7", "M", "M"),
    ("2.0 - {0}", "M", "M"), ("torch.rsub({0}, {1}, alpha=2)", "MM", "M"),
    ("F.softplus({0}, 2)", "M", "M"), ("{0}.sin()", "M", "M"), ("F.leaky_relu({0}, 0.2)", "M", "M"),
    ("({0}.abs() + 0.1).sqrt()", "M", "M"),
    # two of them
    ("{0} + {1}", "MM", "M"), ("{0} * {1}", "MM", "M"), ("{0} - 0.5 * {1}", "MM", "M"),
    ("{0} * {1}", "MR", "M"), ("{0} + {1}", "MR", "M"), ("{0} * {1}", "MC", "M"),
    ("{0} / (1 + {1}.square())", "MM", "M"), ("torch.where(k, {0}, {1})", "MM", "M"),
    ("torch.where({0} > 0, {0}, {1})", "MM", "M"), ("torch.maximum({0}, {1})", "MM", "M"),
    ("torch.addcmul({0}, {1}, {2}, value=0.3)", "MMM", "M"), ("torch.lerp({0}, {1}, 0.3)", "MM", "M"),
    ("{0}.detach() * {1}", "MM", "M"),
    # products
    ("{0} @ a", "M", "M"), ("{0} @ {1} @ {2} * 0.1", "MTM", "M"),
    ("torch.addmm({1}, {0}, a, beta=0.5)", "MR", "M"),
    ("torch.einsum('ij,kj->ik', {0}, {1}) @ {0} * 0.1", "MM", "M"),
    # rows
    ("{0}.softmax(1)", "M", "M"), ("{0}.log_softmax(1)", "M", "M"),
    ("F.layer_norm({0}, (4,), {1})", "MR", "M"), ("{0} - {0}.mean(1, keepdim=True)", "M", "M"),
    ("{0} / ({0}.square().sum(1, keepdim=True) + 1).sqrt()", "M", "M"), ("{0}.cumsum(1)", "M", "M"),
    ("({0} * 0.5).cumprod(1)", "M", "M"), ("{0}.sort(1).values", "M", "M"),
    ("{0}.logcumsumexp(1)", "M", "M"), ("{0}.flip(0)", "M", "M"), ("{0}.roll(1, 1)", "M", "M"),
    ("{0}.gather(1, k.long())", "M", "M"), ("{0}.masked_fill(k, 0.4)", "M", "M"),
    ("{0}[:, [2, 0, 2, 1]]", "M", "M"), ("F.pad({0}[:, 1:3], (1, 1), value=0.7)", "M", "M"),
    ("{0}.tril()", "M", "M"), ("torch.fft.irfft(torch.fft.rfft({0}) * 1j, n=4)", "M", "M"),
    ("torch.complex({0}, {1} + 2).abs()", "MM", "M"),
    ("torch.zeros(3, 4, dtype={0}.dtype).scatter_add(1, k.long(), {0})", "M", "M"),
    ("{0}.sum(1, keepdim=True)", "M", "C"), ("{0}.logsumexp(1, keepdim=True)", "M", "C"),
    ("{0}.amax(1, keepdim=True)", "M", "C"), ("{0}.var(1, keepdim=True)", "M", "C"),
    ("{0}[:, :1]", "M", "C"), ("{0}.mean(0)", "M", "R"), ("{0}[1]", "M", "R"), ("{0} * b", "R", "R"),
    ("b.tanh()", "", "R"),
    # views and copies
    ("{0}.view(3, 4)", "M", "M"), ("{0}.reshape(2, 6).view(3, 4)", "M", "M"), ("{0}[:]", "M", "M"),
    ("{0}.clone()", "M", "M"), ("{0}.t()", "M", "T"), ("{0}.t()", "T", "M"),
    ("{0}.t().contiguous().t()", "M", "M"), ("{0}[:, :2]", "M", "H"), ("{0}[:, 1::2]", "M", "H"),
    ("{0}.narrow(1, 1, 2)", "M", "H"), ("{0}.view(3, 2, 2)[:, 0]", "M", "H"),
    ("{0}.as_strided((3, 2), (4, 1), 1)", "M", "H"), ("(2 * {0}).unfold(1, 3, 1).tanh()[:, :, 1]", "M", "H"),
    ("({0} * 0.5).unfold(1, 2, 1).square().mean(1)", "M", "H"),
    ("(0.5 * {0}).as_strided((3, 2, 2), (4, 1, 1)).exp()[:, :, 1]", "M", "H"),
    ("{0}.unflatten(1, (2, 2)).transpose(1, 2).select(1, 1)", "M", "H"),
    ("torch.cat([{0}, {1}], 1)", "HH", "M"), ("torch.stack([{0}, {1}], 2).flatten(1)", "HH", "M"),
    ("{0}.unsqueeze(0).expand(3, 4) * {1}", "RM", "M"), ("{0}.chunk(2, 1)[1]", "M", "H"),
    ("{0}.unbind(1)[2][:, None]", "M", "C"),
)  # fmt: skip
_WRITES: tuple[_Statement, ...] = (
    ("{0} *= 1.5", "M", None), ("{0} += {1}", "MM", None), ("{0} -= {1}", "MC", None),
    ("{0} += {1}", "MR", None), ("{0} /= {1}.sum(1, keepdim=True).square() + 2", "MM", None),
    ("{0} /= {0}.sum() + 20", "M", None), ("{0} /= {0}.sum(1, keepdim=True) + 20", "M", None),
    ("{0} *= {1}", "MM", None), ("{0} *= {1}", "MR", None), ("{0}.mul_({0}.detach())", "M", None),
    ("{0} /= {1}", "MC", None), ("{0}.div_(3.0)", "M", None), ("{0}.tanh_()", "M", None),
    ("{0}.sigmoid_()", "M", None), ("{0}.relu_()", "M", None), ("{0}.mul_(0.2).exp_()", "M", None),
    ("{0}.square_()", "M", None), ("{0}.sin_()", "M", None), ("{0}.clamp_(-0.5, 0.8)", "M", None),
    ("{0}.neg_()", "M", None), ("{0}.add_({1}, alpha=0.3)", "MM", None),
    ("{0}.sub_({1}.detach())", "MM", None), ("{0}.addcmul_({1}, {2})", "MMM", None),
    ("{0}.lerp_({1}, 0.2)", "MM", None), ("{0}.masked_fill_(k, 0.3)", "M", None),
    ("{0}[k] = 0.2", "M", None), ("{0}[k] *= 2.0", "M", None), ("{0}[{1} > 0] = 0.1", "MM", None),
    ("{0}[:, 0] = {1}[:, 1]", "MM", None), ("{0}[1] = {1}", "MR", None), ("{0}[2] = 0.5", "M", None),
    ("{0}[:, 1] *= {1}[:, 0]", "MM", None), ("{0}[:, 2].exp_()", "M", None),
    ("{0}.copy_({1})", "MM", None), ("{0}.copy_(x)", "M", None), ("{0}.zero_()", "M", None),
    ("{0}.fill_(0.5)", "M", None), ("{0}.index_add_(1, torch.tensor([3, 1]), {1})", "MH", None),
    ("{0}.index_put_((torch.tensor([0, 0]),), {1}[:2], accumulate=True)", "MM", None),
    ("{0}.scatter_(1, k[:, :1].long(), {1})", "MC", None), ("{0}.cumsum_(1)", "M", None),
    ("{0}.fill_diagonal_(0.1)", "M", None), ("{0}.narrow(0, 1, 2)[:, 1:].mul_(2.0)", "M", None),
    ("{0}.t().mul_({1})", "MT", None), ("{0}.diagonal().mul_(3.0)", "M", None),
    # through views that have a name
    ("{0} *= 2.0", "H", None), ("{0} += {1}", "HH", None), ("{0}.mul_({1})", "HC", None),
    ("{0}.sin_()", "H", None), ("{0}.copy_({1})", "HH", None), ("{0}[:, 0] = {1}[:, 1]", "HH", None),
    ("{0}.zero_()", "H", None), ("{0} *= {1}", "TT", None), ("{0} += 0.3", "T", None),
    ("{0} *= 0.5", "C", None), ("{0}.add_({1})", "CC", None), ("{0}.mul_({1})", "RR", None),
    ("{0} += b", "R", None), ("torch.mul(x, 2.0, out={0}.detach())", "M", None),
)  # fmt: skip

# -- losses ----------------------------------------------------------------------------------------

_BEFORE = (
    "", "z = z * 1.3", "z = z.clone(); z *= 0.7", "z = z.reshape(2, 6).view(3, 4)",
    "z = z.clone(); z[:, 0] = 0.0", "z = z.clone(); v = z[:]; z.mul_(2.0); z = v",
    "z = torch.cat([z[:, :2], u[:, 2:]], 1)", "z = z.t().contiguous().t()", "z = (z * 1).tanh_()",
    "z = z - z.mean(0)",
)  # fmt: skip
# Losses an element or an example ("l"), or scalars ("loss").
_EACH = (
    "F.cross_entropy(z, y, reduction='none')",
    "F.cross_entropy(z, y, w, reduction='none', label_smoothing=0.1)",
    "F.cross_entropy(z, p, reduction='none')", "F.mse_loss(z, t, reduction='none')",
    "F.binary_cross_entropy_with_logits(z, t, reduction='none')",
    "F.binary_cross_entropy_with_logits(z, t, pos_weight=w, reduction='none')",
    "F.mse_loss(z, u, reduction='none')", "F.cross_entropy(z, u.softmax(1), reduction='none')",
    "F.smooth_l1_loss(z, t, reduction='none')", "-(p * z.log_softmax(1)).sum(1)", "z.square()",
)  # fmt: skip
_SCALAR = (
    "F.cross_entropy(z, y)", "F.cross_entropy(z, y, w, ignore_index=int(y[0]))",
    "F.cross_entropy(z, y, label_smoothing=0.3)", "F.cross_entropy(z, p, label_smoothing=0.2)",
    "F.mse_loss(z, t)", "F.mse_loss(z, t, reduction='sum')", "F.binary_cross_entropy_with_logits(z, t)",
    "F.binary_cross_entropy_with_logits(z, t, w)", "F.mse_loss(z, u)",
    "F.cross_entropy(z, u.softmax(1))", "F.cross_entropy(z, z.softmax(1))",
    "F.binary_cross_entropy_with_logits(z, u.sigmoid())",
    "F.kl_div(z.log_softmax(1), u.softmax(1), reduction='batchmean')", "F.huber_loss(z, t)",
    "F.nll_loss(z.log_softmax(1), y)", "F.poisson_nll_loss(z, t)",
    "F.gaussian_nll_loss(z, t, u.square() + 0.5)", "z.logsumexp(1).sum()",
    "F.cross_entropy(z @ u.T, torch.arange(3))", "(F.cross_entropy(z, y) * 0.3).exp()",
    "torch.cdist(z, t).square().mean()",
)  # fmt: skip
_EACH_AFTER = (
    "", "l *= w[0]", "l[0] = 0.0", "l[1:] *= 3.0", "l = l * l.detach()", "l[l > 0.5] = 0.0",
    "l.narrow(0, 0, 2).mul_(2.0)", "l = l.sort(0).values", "l /= 4", "l.clamp_(max=1.2)", "l = l.square()",
    "l.masked_fill_(l.detach() > 1, 0.0)",
)  # fmt: skip
_AFTER = (
    "", "loss /= 4", "loss *= 0.5", "loss = loss * 2 + 1", "loss += 0.1 * z.square().mean()",
    "loss = loss + 0.1 * u.pow(4).mean()", "loss = loss.exp()", "loss.mul_(0.3).exp_()",
    "loss = loss.square()", "loss = -loss", "loss.neg_()", "loss = loss / (loss.detach() + 3)",
    "loss = loss * F.mse_loss(z, t)", "loss += F.mse_loss(z, t)",
    "loss = torch.stack([loss, F.mse_loss(u, t)]).logsumexp(0)",
)  # fmt: skip
_WITH_PARAMETERS = (
    "loss = loss + 0.1 * a.square().sum()", "loss += 0.1 * b.abs().sum()",
    "loss = loss * b[0].exp() - b[0]", "loss = loss + F.mse_loss(c, t)",
    "loss = loss + 0.1 * (a.T @ a - 1).square().sum()",
    "loss = loss + F.cross_entropy(z * b[1].exp(), y)", "loss = loss + F.mse_loss(z, c)",
    "loss = loss + (z @ a).square().mean()", "loss = a.square().sum() + 0 * loss",
)  # fmt: skip
# (what the model returns, how the loss takes it apart)
_OUTPUTS = (
    ("z", "z = u = outputs"), ("(z, u)", "z, u = outputs"),
    ("{'z': z, 'u': u}", "z, u = outputs['z'], outputs['u']"),
    ("torch.stack([z, u])", "z, u = outputs[0], outputs[1]"),
    ("(z, [u, x])", "z, u = outputs[0], outputs[1][0]"),
    ("torch.cat([z, u], 1)", "z, u = outputs[:, :4], outputs[:, 4:]"),
)  # fmt: skip


def program(seed: int, length: int, *, with_parameters: bool = False) -> Program:
    """The program of a seed with so many statements between its first and its last ones.

    A shorter program of the same seed is the longer one without its last statements.

    Args:
        with_parameters: Whether the loss reads parameters itself.
    """
    statements, rest = Random(f"{seed} statements"), Random(f"{seed} rest")
    pool: dict[str, list[str]] = {
        "M": ["x", "v0", "v1"],
        "R": ["b", "w"],
        "H": [],
        "T": [],
        "C": [],
    }
    lines = ["v0 = x @ a + b", "v1 = c * 1"]
    for number in range(2, 2 + length):
        kind = statements.choice((_NEW, _WRITES))
        source, takes, gives = statements.choice([s for s in kind if all(_choices(pool, s))])
        names = [statements.choice(names) for names in _choices(pool, (source, takes, gives))]
        line = source.format(*names)
        if gives is not None:
            line = f"v{number} = {line}"
            pool[gives].append(f"v{number}")
        lines.append(line)
    own = [name for name in pool["M"] if name not in _READ_ONLY]
    lines.append(f"z, u = {rest.choice(own[-3:])} * 1, {rest.choice(own)} + 0.1 * v0")
    outputs, opened = rest.choice(_OUTPUTS)
    steps = [rest.choice(_BEFORE)]
    if rest.random() < 0.5:
        steps += [f"l = {rest.choice(_EACH)}", rest.choice(_EACH_AFTER)]
        steps += [f"loss = l.{rest.choice(('mean', 'sum'))}()"]
    else:
        steps += [f"loss = {rest.choice(_SCALAR)}"]
    steps += [rest.choice(_AFTER), rest.choice(_WITH_PARAMETERS) if with_parameters else ""]
    return Program(
        forward="\n".join(lines),
        loss="\n".join(step for step in steps if step),
        outputs=outputs,
        opened=opened,
        uses_parameters=with_parameters,
    )


_READ_ONLY = {"x", "b", "w"}  # data, and leaves


def _choices(pool: dict[str, list[str]], statement: _Statement) -> list[list[str]]:
    """Which variables may stand for each of a statement's arguments: the newest ones of their shapes."""
    _, takes, gives = statement
    return [
        [n for n in pool[shape] if gives is not None or i > 0 or n not in _READ_ONLY][-4:]
        for i, shape in enumerate(takes)
    ]
