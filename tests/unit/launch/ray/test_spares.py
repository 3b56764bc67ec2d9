"""Spare processes: what a new process of a worker does before Ray gives it anything to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hfdist.launch.ray import spares


@pytest.mark.parametrize("with_mlflow", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_process_of_these_variables_has_imported_what_a_worker_needs(with_mlflow: bool) -> None:
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as HOOK

    hook = spares.variables(3, with_mlflow=with_mlflow)[HOOK]
    program = (
        "import sys\n"
        "from ray._private.runtime_env.setup_hook import load_and_execute_setup_hook as execute\n"
        f"assert execute({hook!r}) is None\n"
        "print([m in sys.modules for m in ('hfdist.training.worker', 'ray.train.torch', 'mlflow')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([True, True, with_mlflow]), done.stderr


def test_libraries_are_imported_with_the_threads_of_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert spares.variables(3, with_mlflow=False)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert spares.variables(3, with_mlflow=False)["OMP_NUM_THREADS"] == "2"
