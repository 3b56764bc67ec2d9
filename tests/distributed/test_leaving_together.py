"""One machine of several will be taken away in the middle of a step: all of them save at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from rules import CG

from hfdist.comm import Communicator
from hfdist.config.job import RunConfig, from_dict
from hfdist.training.display import QuietDisplay
from hfdist.training.worker import Job, run

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


class Notice(QuietDisplay):
    """Rank 1 has its notice from the second iteration of step 2 on."""

    def __init__(self, rank: int) -> None:
        self.rank, self.now, self.begun = rank, (0, 0), 0

    def cg_iteration(self, step: int, iteration: int, max_iter: int) -> None:
        self.now = (step, iteration)
        self.begun += (step, iteration) == (2, 1)

    def is_leaving(self) -> bool:
        return self.rank == 1 and self.now >= (2, 2)


def train(comm: Communicator, config: RunConfig, run_dir: Path, notice: bool) -> dict[str, Any]:
    display = Notice(comm.rank)
    is_leaving = display.is_leaving if notice else None
    result = run(Job(config=config, run_dir=run_dir, is_leaving=is_leaving), comm, display)
    return result | {"begun": display.begun}


@pytest.mark.parametrize("shard_solver_state", [False, True])
def test_the_step_begins_anew_on_all_ranks(shard_solver_state: bool, tmp_path: Path) -> None:
    config = from_dict(
        {
            "task": "rank_tasks:Mlp",
            "steps": 4,
            "output": str(tmp_path),
            "optim": {**CG, "cg_max_iter": 6, "shard_solver_state": shard_solver_state},
            "batches": {"gradient": 23, "curvature": 10, "line_search": 13},
            "checkpoint": {"every": 100},
            "tracking": {"enabled": False},
        }
    )
    results = {}
    for name, notice in (("undisturbed", False), ("leaving", True)):
        (tmp_path / name).mkdir()
        results[name] = on_ranks(2, train, config, tmp_path / name, notice, timeout=120)
    assert [r["begun"] for r in results["undisturbed"]] == [1, 1]
    assert [r["begun"] for r in results["leaving"]] == [2, 2]
    hashes = {r["parameters_sha256"] for both in results.values() for r in both}
    assert len(hashes) == 1
    saved = sorted(path.name for path in (tmp_path / "leaving" / "checkpoints").iterdir())
    assert saved[0] == "000001-step-00000002"
    lines = (tmp_path / "leaving" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
