"""What is computed on a device and on the CPU alike, to be compared: functions of (device, ..) -> numbers.

They run in other processes (see `devices.on`), so arguments and results are picklable, tensors the host's.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import standin
import torch
from cases import named, num_rows, rows
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import hfdist.api
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.curvature.engines import ProductEngine, RecomputedGGNProduct
from hfdist.curvature.fixed_randomness import FixedRandomness
from hfdist.curvature.layout import make_layout
from hfdist.curvature.memory import reserved_bytes
from hfdist.curvature.microbatch import from_closure, from_task
from hfdist.curvature.objective import Overrides, Problem, Regularisation, Roles
from hfdist.curvature.params import ParameterVector
from hfdist.curvature.preconditioners import Context, make_preconditioner
from hfdist.curvature.verify import Verifier
from hfdist.devices import synchronize
from hfdist.errors import StepMemoryError
from hfdist.hessian_free import HessianFree
from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.cg import cg
from hfdist.optim.step import HFState, hf_step
from hfdist.tasks.task import Task

Values = dict[str, Any]
EXAMPLES = 500
JOBS = Path(__file__).parents[1] / "deploy" / "jobs"


def moved(value: Any, device: torch.device) -> Any:
    """The tensors in a pytree, on the device."""
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)


def problem_of(
    device: torch.device,
    name: str,
    options: HFOptions,
    sizes: tuple[int, ...] = (),
    engine: ProductEngine | None = None,
    model: nn.Module | None = None,
    comm: Communicator | None = None,
    first: int = 0,
) -> Problem:
    """A case's problem on the device, in microbatches of these sizes from the `first` example on."""
    case = named([name])[0]
    model = case.model().to(device) if model is None else model
    comm = comm or SerialCommunicator(device)
    batch, task, low = case.data(), case.task(), first
    parts = []
    for k, size in enumerate(sizes or (num_rows(batch),)):
        part = moved(rows(batch, low, low + size), device)
        parts.append((from_task(task, model, part, seed=11 + k), part))
        low += size
    role = [microbatch for microbatch, _ in parts]
    context = Context(task=task, model=model, gradient=parts, options=options)
    params = ParameterVector(p for p in model.parameters() if p.requires_grad)
    engine = engine or ProductEngine(requested=options.product_engine)
    engine.captures = options.capture_products
    return Problem(
        params=params,
        comm=comm,
        layout=make_layout(params, comm, options),
        roles=Roles(gradient=role, curvature=role, loss=role),
        reduction=case.reduction,
        curvature_opt=options.curvature_opt,
        regularisation=Regularisation(weight_decay=options.weight_decay),
        frozen=FixedRandomness(device, model),
        engine=engine,
        overrides=Overrides(preconditioner=make_preconditioner(context)),
    )


def products(
    device: torch.device,
    name: str,
    curvature: Literal["ggn", "hessian"] = "ggn",
    engine: str = "linearize",
    sizes: tuple[int, ...] = (),
) -> Values:
    """Loss, gradient and two products of a case."""
    options = HFOptions(curvature_opt=curvature, product_engine=engine, weight_decay=0.3)
    problem = problem_of(device, name, options, sizes)
    loss, g = problem.loss_and_gradient()
    B = problem.curvature(0.1)
    v = torch.randn(2, problem.numel, dtype=g.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.stack([B(row.to(device)).clone() for row in v])
    assert found.device == device
    return {"loss": loss, "gradient": g.cpu(), "products": found.cpu()}


def products_of(device: torch.device, names: list[str], *settings: Any) -> Values:
    """`products` of several cases."""
    return {name: products(device, name, *settings) for name in names}


def steps_of(device: torch.device, name: str, changes: list[dict[str, Any]]) -> list[Values]:
    """`steps` of a case under several sets of options."""
    return [steps(device, name, 3, **these) for these in changes]


def steps(device: torch.device, name: str, number: int, **changes: Any) -> Values:
    """Whole steps of a case: the report of each, the parameters and buffers after them; or the error."""
    try:
        options = HFOptions(**{"damping": 0.1, "cg_max_iter": 8, "weight_decay": 1e-3, **changes})
    except ValueError as error:
        return {"error": str(error)}
    case = named([name])[0]
    model = case.model().to(device)
    state = HFState(damping=options.damping)
    engine = ProductEngine(requested=options.product_engine)
    reports = []
    for _ in range(number):
        problem = problem_of(device, name, options, (4, 2), engine, model)
        try:
            report, state = hf_step(problem, state, options)
        except ValueError as error:  # a solver of residuals has none here
            return {"error": str(error)}
        assert state.x0 is None or state.x0.device.type == device.type
        reports.append(
            {
                key: getattr(report, key)
                for key in ("loss", "final_loss", "accepted", "alpha", "next_damping", "grad_norm")
            }
        )
    found: Values = {"reports": reports}
    found |= {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return found


def steps_of_rank(comm: Communicator, changes: dict[str, Any]) -> Values:
    """Steps of one of two ranks, with examples of its own."""
    options = HFOptions(**{"damping": 0.1, "cg_max_iter": 8, "weight_decay": 1e-3, **changes})
    case = named(["linear-ce"])[0]
    model = case.model().to(comm.device)
    state = HFState(damping=options.damping)
    found: Values = {"losses": []}
    for _ in range(2):
        problem = problem_of(
            comm.device, "linear-ce", options, (2, 1), model=model, comm=comm, first=3 * comm.rank
        )
        report, state = hf_step(problem, state, options)
        found["losses"].append(report.final_loss)
    return found | {key: value.detach().cpu() for key, value in model.state_dict().items()}


def counted_step(
    device: torch.device, sizes: tuple[int, ...], changes: dict[str, Any], layers: int = 2
) -> Values:
    """What the third step of a model of many parameters and few examples asks of the stand-in."""
    options = HFOptions(
        **{
            "damping": 1.0,
            "weight_decay": 1e-3,
            "verify": "off",
            "adapt_damping": False,
            "cg_stop": "residual",
            "cg_tol": 0.0,
            "use_cg_backtracking": False,
            **changes,
        }
    )
    torch.manual_seed(0)
    task = SquaredError(layers)
    model = task.model().to(device)
    x, y = (torch.randn(6, 40, dtype=torch.float64).to(device) for _ in range(2))
    params = ParameterVector(model.parameters())
    engine = ProductEngine(
        requested=options.product_engine,
        verifier=Verifier(mode="off"),
        captures=options.capture_products,
    )
    state = HFState(damping=1.0)
    for _ in range(3):
        parts, low = [], 0
        for k, size in enumerate(sizes):
            part = (x[low : low + size], y[low : low + size])
            parts.append((from_task(task, model, part, seed=k), part))
            low += size
        role = [microbatch for microbatch, _ in parts]
        context = Context(task=task, model=model, gradient=parts, options=options)
        problem = Problem(
            params=params,
            roles=Roles(gradient=role, curvature=role, loss=role),
            regularisation=Regularisation(weight_decay=options.weight_decay),
            frozen=FixedRandomness(device, model),
            engine=engine,
            overrides=Overrides(preconditioner=make_preconditioner(context)),
        )
        del parts, part, context
        gc.collect()  # or the last step's memory is freed in the middle of this one
        held = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        with standin.counted() as counts:
            report, state = hf_step(problem, state, options)
        peak = torch.accelerator.max_memory_allocated() - held
        del problem, role
    large = params.numel * 8
    return {
        **counts.counts,
        "iterations": report.cg_iterations,
        "large": sum(size >= large for size in counts.allocations),
        "peak": peak / large,
        "formula": reserved_bytes(params, options) / large,
    }


class SquaredError(Task):
    """A loss whose curvature depends on no value."""

    def __init__(self, layers: int = 2) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        hidden = [(nn.Linear(40, 40), nn.Tanh()) for _ in range(self.layers - 1)]
        return nn.Sequential(*(m for pair in hidden for m in pair), nn.Linear(40, 40)).double()

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


def counted_run(device: torch.device, job: str, folder: str, steps: int) -> Values:
    """What a run of so many steps asks of the stand-in."""
    changes = [
        *(f"output={folder}", f"device={device.type}", f"steps={steps}"),
        *("evaluate.every=0", f"batches.gradient={EXAMPLES}", f"batches.curvature={EXAMPLES}"),
    ]
    with standin.counted() as counts:
        hfdist.api.train(JOBS / f"{job}.yaml", [*changes, "tracking.enabled=false"])
    return counts.counts


def own_loop(device: torch.device, **settings: Any) -> Values:
    """`HessianFree` in a loop of one's own, saved and loaded on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(3, (12,))
    model, x, y = model.to(device), x.to(device), y.to(device)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), damping=0.1, **settings)
    losses = [optimizer.step(forward) for _ in range(2)]
    saved = optimizer.state_dict()
    optimizer = HessianFree(model.parameters(), damping=0.1, **settings)
    optimizer.load_state_dict(saved)
    losses += [optimizer.step(forward) for _ in range(2)]
    pairs = [(x[:7], y[:7]), (x[7:], y[7:])]
    losses.append(optimizer.acc_step(model, nn.functional.cross_entropy, pairs))
    return {"losses": losses, **{k: v.detach().cpu() for k, v in model.state_dict().items()}}


def with_enough_memory(device: torch.device, settings: Values) -> Values:
    """`short_of_memory` that never is."""
    return short_of_memory(device, settings, first=1e9)


def captured_products(device: torch.device, name: str, captures: bool) -> Values:
    """Three products of a program, and what was said of graphs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
    x = torch.randn(8, 4, dtype=torch.float64).to(device)
    y = torch.randn(8, 3, dtype=torch.float64).to(device)
    # A mask is read by the host, which must know how many numbers it leaves.
    mask = (torch.arange(8) % 3 > 0).to(device)

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs = model(x)[mask] if name == "masked" else model(x)
        target = y[mask] if name == "masked" else y
        return nn.functional.mse_loss(outputs, target), outputs

    engine = ProductEngine(captures=captures)
    if name == "double_backward":
        engine.requested = "double_backward"
    said: list[str] = []
    engine.warn = said.append  # type: ignore[method-assign]
    role = [from_closure(evaluate, 0)]
    problem = Problem(
        params=ParameterVector(model.parameters()),
        roles=Roles(gradient=role, curvature=role, loss=role),
        frozen=FixedRandomness(device, model),
        engine=engine,
    )
    _, g = problem.loss_and_gradient()
    B, found = problem.curvature(0.1), []
    counts: list[dict[str, int]] = []
    for k in range(4):
        v = g * (1.0 + k) + k
        if device.type == standin.NAME:
            with standin.counted() as counted:
                found.append(B(v).cpu())
            counts.append(counted.counts)
        else:
            found.append(B(v).cpu())
    return {"products": found, "said": said, "counts": counts}


def short_of_memory(device: torch.device, settings: Values, first: float = 10_000.0) -> Values:
    """Three steps of `HessianFree` on the stand-in, of which the second is tried with ever more memory until
    there is enough for it: what was said when there was not, and what is left in the end.

    Asserts that nothing but the message is left of a step that ran out of memory.
    """
    torch.manual_seed(0)
    # Momentum, buffers and statistics are state that a failed step must not touch.
    model = nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 3))
    model = model.double().to(device)
    x = torch.randn(60, 20, dtype=torch.float64)
    y = torch.randint(3, (60,))
    x, y = x.to(device), y.to(device)
    pairs = [(x[k : k + 20], y[k : k + 20]) for k in range(0, 60, 20)]
    optimizer = HessianFree(model.parameters(), damping=0.1, seed=0, **settings)

    def take() -> float:
        return optimizer.acc_step(model, nn.functional.cross_entropy, pairs)

    def everything() -> Values:
        state = optimizer.state_dict()
        state["param_groups"] = [
            {k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]
        ]
        found = {"model": model.state_dict(), "state": state}
        return copy.deepcopy(moved(found, torch.device("cpu")))

    losses, said = [take()], []
    before, more = everything(), first
    random = torch.get_rng_state()
    while True:
        gc.collect()
        held = torch.accelerator.memory_allocated()
        torch.ops.standin.set_memory(held + int(more))
        try:
            losses.append(take())
            break
        except StepMemoryError as error:
            said.append(str(error))
        finally:
            torch.ops.standin.set_memory(16 << 30)
        assert identical(before, everything())
        assert torch.equal(random, torch.get_rng_state())
        more *= 1.6
    losses.append(take())
    return {"said": said, "losses": losses, "model": everything()["model"]}


def identical(a: Any, b: Any) -> bool:
    """Whether two pytrees are the same, tensors to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b))
    return bool(a == b)


def short_run(device: torch.device, job: str, folder: str, *changes: str) -> Values:
    """A run on the stand-in that is resumed with too little memory, and with enough."""
    given = [f"output={folder}", f"device={device.type}", "dtype=float64", "tracking.enabled=false"]
    whole = hfdist.train(JOBS / f"{job}.yaml", [*given, *changes, "steps=3"])
    begun = hfdist.train(JOBS / f"{job}.yaml", [*given, *changes, "steps=1"])
    run_dir = Path(folder) / begun["run_id"]
    gc.collect()
    held = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    hfdist.train(JOBS / f"{job}.yaml", [*given, *changes, "steps=1"])
    peak = torch.accelerator.max_memory_allocated() - held
    gc.collect()
    torch.ops.standin.set_memory(torch.accelerator.memory_allocated() + int(0.6 * peak))
    said = ""
    try:
        hfdist.api.resume(run_dir, ["steps=3"])
    except StepMemoryError as error:
        said = str(error)
    finally:
        torch.ops.standin.set_memory(16 << 30)
    failed = json.loads((run_dir / "result.json").read_text())
    resumed = hfdist.api.resume(run_dir, ["steps=3"])
    return {
        "said": said,
        "failed": {key: failed[key] for key in ("status", "steps", "error")},
        "whole": whole["parameters_sha256"],
        "resumed": resumed["parameters_sha256"],
    }


def kept_graphs(device: torch.device, share: float) -> Values:
    """Products of a step where memory is this share of what all graphs and the solver take, by default's
    budget: how many microbatches are recomputed, and the gradient and product."""
    task, width = SquaredError(), 40
    torch.manual_seed(0)
    model = task.model().to(device)
    x = torch.randn(8 * 200, width, dtype=torch.float64).to(device)
    y = torch.randn(8 * 200, width, dtype=torch.float64).to(device)
    parts = [(x[k : k + 200], y[k : k + 200]) for k in range(0, len(x), 200)]
    role = [from_task(task, model, part, seed=k) for k, part in enumerate(parts)]
    options = HFOptions(solver="cg", preconditioner="none", verify="off")
    params = ParameterVector(model.parameters())
    reserved = reserved_bytes(params, options)
    engine = ProductEngine(verifier=Verifier(mode="off"), reserved=reserved)

    def found() -> Values:
        problem = Problem(
            params=params,
            roles=Roles(gradient=role, curvature=role, loss=role),
            frozen=FixedRandomness(device, model),
            engine=engine,
        )
        loss, g = problem.loss_and_gradient()
        products = problem._products or []
        recomputed = sum(isinstance(product, RecomputedGGNProduct) for product in products)
        product = problem.curvature(0.1)(g)
        return {"recomputed": recomputed, "g": g.cpu(), "product": product.cpu(), "loss": loss}

    held = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    plenty = found()
    needed = torch.accelerator.max_memory_allocated() - held + reserved
    gc.collect()
    torch.ops.standin.set_memory(torch.accelerator.memory_allocated() + int(share * needed))
    try:
        little = found()
    finally:
        torch.ops.standin.set_memory(16 << 30)
    return {"plenty": plenty, "little": little}


def losses_of(device: torch.device, body: str, curvature: Literal["ggn", "hessian"]) -> list[float]:
    """Of steps of a recurrent net, or of attention with dropout, in float64."""
    torch.manual_seed(0)
    layer: nn.Module = nn.LSTM(4, 8, batch_first=True)
    if body == "attention":
        # Random numbers of devices differ: dropout is checked by the cases.
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"body": layer, "head": nn.Linear(8 if body == "lstm" else 4, 3)})
    model = model.double().to(device)
    x = torch.randn(6, 5, 4, dtype=torch.float64).to(device)
    y = torch.randint(3, (6,)).to(device)

    def forward() -> tuple[Tensor, Tensor]:
        states = model["body"](x)
        states = states[0] if isinstance(states, tuple) else states
        outputs = model["head"](states.mean(1))
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), curvature_opt=curvature)
    return [optimizer.step(forward) for _ in range(4)]


def late_and_plain_solves(device: torch.device) -> list[Values]:
    """CG that reads its scalars late, and at once."""
    d = torch.logspace(-2, 2, 1000, dtype=torch.float64).to(device)
    rules = HFOptions(cg_stop="residual", cg_tol=1e-8, cg_max_iter=100)
    found = []
    for lagged in (True, False):
        result = cg(lambda v: d * v, torch.ones_like(d), None, None, rules, lagged=lagged)
        found.append(
            {
                "x": result.x.cpu(),
                "num_products": result.num_products,
                "iterations": result.iterations,
            }
        )
    return found


def waits_of_a_step(device: torch.device) -> int:
    """How often the host waits for the device in a step of the defaults, after the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).double().to(device)
    x, y = torch.randn(60, 20, dtype=torch.float64).to(device), torch.randint(3, (60,)).to(device)

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return nn.functional.cross_entropy(outputs, y), outputs

    optimizer = HessianFree(model.parameters(), krylov_max_dim=5, krylov_length="full")
    optimizer.step(forward)
    if device.type == standin.NAME:
        with standin.counted() as counts:
            optimizer.step(forward)
        return counts["host_read"] + counts["to_device"] + counts["synchronize"]
    if device.type != "cuda":
        raise NotImplementedError(f"torch does not say when the host waits for {device.type}")
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            optimizer.step(forward)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in said)


def seconds_of_products(device: torch.device) -> Values:
    """Medians of a small model's gradient, product, and product as a graph of kernels."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh()))).to(device)
    x, y = (torch.randn(128, 64).to(device) for _ in range(2))

    def forward() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return nn.functional.mse_loss(outputs, y), outputs

    role = [from_closure(forward, 0)]
    params = ParameterVector(model.parameters())
    found: Values = {}

    def timed(name: str, function: Any) -> None:
        seconds = []
        for k in range(15):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if k >= 3:
                seconds.append(time.perf_counter() - start)
        found[name] = sorted(seconds)[len(seconds) // 2]

    def gradient() -> None:
        torch.autograd.grad(forward()[0], list(model.parameters()))

    timed("gradient", gradient)
    for captures in (False, True):
        problem = Problem(
            params=params,
            roles=Roles(gradient=role, curvature=role, loss=role),
            frozen=FixedRandomness(device, model),
            engine=ProductEngine(captures=captures),
        )
        _, g = problem.loss_and_gradient()
        B = problem.curvature(0.1)
        timed("captured" if captures else "product", lambda B=B, g=g: B(g))
    return found


def train(device: torch.device, job: str, folder: str, *changes: str) -> Values:
    """A job in float64, stopped and resumed half way, evaluated; its folder stays."""
    given = [f"output={folder}", f"device={device.type}", "dtype=float64", "steps=2", *changes]
    first = hfdist.train(JOBS / f"{job}.yaml", [*given, "tracking.enabled=false"])
    run_dir = Path(folder) / first["run_id"]
    result = hfdist.api.resume(run_dir, ["steps=4"])
    return {
        "final_loss": result["final_loss"],
        "evaluation": result.get("evaluation"),
        "run_dir": str(run_dir),
    }


def resume(device: torch.device, run_dir: str, steps: int) -> Values:
    """A run that goes on for so many steps in all."""
    result = hfdist.api.resume(Path(run_dir), [f"steps={steps}", f"device={device.type}"])
    return {"final_loss": result["final_loss"]}


def nothing(device: torch.device) -> None:
    """Starts the device's process."""


def difference(a: Any, b: Any) -> float:
    """Greatest difference of two results, relative to the greatest number of each tensor or list."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max([difference(a[key], b[key]) for key in a], default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max([difference(x, y) for x, y in zip(a, b)], default=0.0)
    if isinstance(a, str | bool) or a is None:
        return 0.0 if a == b else float("inf")
    x, y = (torch.as_tensor(t).double() for t in (a, b))
    assert x.shape == y.shape, f"{list(x.shape)} and {list(y.shape)}"
    if x.numel() == 0 or torch.equal(x, y):
        return 0.0
    if not torch.equal(x.isfinite(), y.isfinite()):
        return float("inf")
    x, y = (t[x.isfinite()] for t in (x, y))
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-300))
