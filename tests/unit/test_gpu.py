"""The same steps on a GPU; `make gpu-test` runs them where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfdist
from hfdist.hessian_free import HessianFree
from hfdist.optim.options import HFOptions
from hfdist.optim.solvers.cg import cg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

JOBS = Path(__file__).parents[2] / "deploy" / "jobs"


@pytest.mark.parametrize("job", ["digits_classifier", "small_net", "rosenbrock"])
def test_a_job_gives_what_it_gives_on_the_cpu(job: str, tmp_path: Path) -> None:
    changes = [f"output={tmp_path}", "tracking.enabled=false", "dtype=float64", "steps=5"]
    losses = [
        hfdist.train(JOBS / f"{job}.yaml", [*changes, f"device={device}"])["final_loss"]
        for device in ("cpu", "cuda")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
@pytest.mark.parametrize("curvature_opt", ["ggn", "hessian"])
def test_kernels_without_second_derivatives_are_avoided(kind: str, curvature_opt: Any) -> None:
    torch.manual_seed(0)
    body: nn.Module = nn.LSTM(4, 8, batch_first=True)
    if kind == "attention":
        body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    model = nn.ModuleDict({"body": body, "head": nn.LazyLinear(3)}).cuda()
    x, y = torch.randn(6, 5, 4, device="cuda"), torch.randint(3, (6,), device="cuda")

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        states = model["body"](x)
        states = states[0] if isinstance(states, tuple) else states
        outputs = model["head"](states.mean(1))
        return nn.functional.cross_entropy(outputs, y), outputs

    forward()
    optimizer = HessianFree(model.parameters(), curvature_opt=curvature_opt)
    losses = [optimizer.step(forward) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_device_never_waits_for_the_host_within_an_iteration() -> None:
    """Scalars of an iteration are read after the next product was started."""
    d = torch.logspace(-2, 2, 1000, device="cuda", dtype=torch.float64)
    b = torch.ones_like(d)
    rules = HFOptions(cg_stop="residual", cg_tol=1e-8, cg_max_iter=100)
    late = cg(lambda v: d * v, b, None, None, rules)
    plain = cg(lambda v: d * v, b, None, None, rules, lagged=False)
    assert torch.equal(late.x, plain.x)
    assert late.num_products == plain.num_products + 1
