"""The trained model as MLflow keeps it: with a signature, loadable by `mlflow.pytorch.load_model`.

It is exported as a graph that any process loads without the task's code and without executing pickles; a
model that cannot be exported is pickled, together with the user's own modules.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tracking.client import is_server
from hfdist.tracking.find_or_create import OpenRun
from hfdist.tracking.own_code import own_code
from hfdist.tracking.spool import Event, Spool

logger = logging.getLogger(__name__)

_EVENT_TAG = "hfdist.event"
_tree_map = torch.utils._pytree.tree_map
_tree_leaves = torch.utils._pytree.tree_leaves


def save_model(model: nn.Module, example_inputs: Any, path: Path) -> None:
    """Save a model in MLflow's format, on the host and in evaluation mode.

    Args:
        model: Stays as it is.
        example_inputs: What it takes, a batch of one: a tensor, a sequence or a mapping of tensors; None: it
            takes nothing.
        path: A folder that does not exist.
    """
    twin = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    args, kwargs = _call(example_inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = twin(*args, **kwargs)
        program = _exported(twin, args, kwargs, outputs)
        if program is not None:
            _save_graph(program, example_inputs, outputs, path)
        else:
            _save_pickle(twin, example_inputs, outputs, path)


def send_model(
    client: Any,
    run: OpenRun,
    spool: Spool,
    event: Event,
    target: Mapping[str, Any],
    metrics: Event | None = None,
) -> None:
    """Make a logged model of the run, and a registered version if the job asks for one. Calling it again
    goes on where the last call ended.

    Args:
        metrics: Event whose metrics are shown beside the model.
    """
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    mark = str(
        event["step"]
    )  # a run that records its model again, after a kill, has one all the same
    found = client.search_logged_models(
        [run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'"
    )
    made = next((m for m in found if m.tags.get(_EVENT_TAG) == mark), None)
    if made is None:
        made = client.create_logged_model(
            experiment_id=run.experiment_id,
            name="model",
            source_run_id=run.run_id,
            tags={_EVENT_TAG: mark},
            params=client.get_run(run.run_id).data.params,
        )
    folder = spool.folder.parent / event["path"]
    description = Model.load(str(folder))
    description.run_id, description.model_id = run.run_id, made.model_id
    description.model_uuid, description.artifact_path = made.model_id, made.artifact_location
    description.save(str(folder / "MLmodel"))
    client.log_model_artifacts(made.model_id, str(folder))
    client.finalize_logged_model(made.model_id, "READY")
    outputs = client.get_run(run.run_id).outputs
    if outputs is None or all(o.model_id != made.model_id for o in outputs.model_outputs):
        client.log_outputs(run.run_id, [LoggedModelOutput(made.model_id, event["step"])])
    if metrics is not None:
        values = [
            Metric(k, v, metrics["time"], metrics["step"], model_id=made.model_id)
            for k, v in metrics["values"].items()
        ]
        client.log_batch(run.run_id, metrics=values)
    if target.get("registered_model"):
        _register(client, run, made, target)


def _register(client: Any, run: OpenRun, made: Any, target: Mapping[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    name, model_id = target["registered_model"], made.model_id
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A database store would look an address models:/.. up in the process's default store, not in itself.
    source = f"models:/{model_id}" if is_server(target["uri"]) else made.artifact_location
    there = client.search_model_versions(f"name = '{name}'")
    version = next((v for v in there if v.model_id == model_id or v.source == source), None)
    if version is None:
        version = client.create_model_version(name, source, run_id=run.run_id, model_id=model_id)
    number = str(version.version)
    if target.get("model_alias"):
        client.set_registered_model_alias(name, target["model_alias"], number)
    if target.get("model_stage"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stages are deprecated, and still asked for
            client.transition_model_version_stage(name, number, target["model_stage"])


# -- export ------------------------------------------------------------------------------------------


def _call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model's call."""
    if example is None:
        return (), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Any | None:
    """The model's graph, for any number of examples; None if the model has none."""
    from torch.export import Dim, export

    # An axis of length one would be taken for a constant.
    args2, kwargs2 = _tree_map(_doubled, (args, kwargs))
    for axes in (None, 1):

        def free(leaf: Any, axes: int | None = axes) -> Any:
            if not isinstance(leaf, Tensor):
                return None
            return {k: Dim.AUTO for k, n in enumerate(leaf.shape[:axes]) if n > 1}

        shapes = _tree_map(free, (args2, kwargs2))
        try:
            program = export(
                model, args2, kwargs2, dynamic_shapes=shapes[1] if kwargs2 else shapes[0]
            )
            again = program.module()(*args, **kwargs)
            torch.testing.assert_close(_tree_leaves(again), _tree_leaves(outputs))
        except Exception as error:
            logger.debug("the model cannot be exported: %s", error)
        else:
            return program
    return None


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf


def _save_graph(program: Any, example: Any, outputs: Any, path: Path) -> None:
    """What `mlflow.pytorch.save_model` writes for graphs, which itself takes no mappings."""
    import mlflow.pyfunc
    from mlflow.models import Model

    data = path / "data"
    data.mkdir(parents=True)
    torch.export.save(program, data / "model.pt2")
    model = Model()
    model.signature = _signature(example, outputs)
    model.add_flavor(
        "pytorch", model_data="data", pytorch_version=str(torch.__version__), code=None
    )
    if isinstance(example, Tensor) and isinstance(outputs, Tensor):
        _save_example(model, example, path)
        mlflow.pyfunc.add_to_model(
            model,
            loader_module="mlflow.pytorch",
            data="data",
            conda_env="conda.yaml",
            python_env="python_env.yaml",
            model_config={"device": None},
        )
    model.model_size_bytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    model.save(str(path / "MLmodel"))
    _save_environment(path)


def _save_pickle(model: nn.Module, example: Any, outputs: Any, path: Path) -> None:
    import mlflow.pytorch

    mlflow.pytorch.save_model(
        model,
        str(path),
        signature=_signature(example, outputs),
        serialization_format="pickle",
        code_paths=own_code(model) or None,
        pip_requirements=_requirements(),
    )


def _save_example(model: Any, example: Tensor, path: Path) -> None:
    from mlflow.models.utils import _save_example as save

    try:
        save(model, example.numpy(), str(path))
    except Exception as error:
        logger.debug("the model's example is not recorded: %s", error)


def _save_environment(path: Path) -> None:
    import yaml
    from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv

    environment = _mlflow_conda_env(additional_pip_deps=_requirements()[1:])
    (path / "conda.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))
    (path / "requirements.txt").write_text("\n".join(_requirements()) + "\n")
    _PythonEnv.current().to_yaml(str(path / "python_env.yaml"))


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "torch", "numpy")]


def _signature(example: Any, outputs: Any) -> Any:
    from mlflow.models import infer_signature

    arrays, returned = _as_arrays(example), _as_arrays(outputs)
    return (
        infer_signature(arrays, returned) if arrays is not None and returned is not None else None
    )


def _as_arrays(values: Any) -> Any:
    """numpy arrays of a tensor or of a flat mapping or sequence of tensors, else None: what a signature
    can say."""
    if isinstance(values, Tensor):
        return (
            values.detach().cpu().float().numpy()
            if values.dtype == torch.bfloat16
            else (values.detach().cpu().numpy())
        )
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = {f"{k}": v for k, v in enumerate(values)}
    if isinstance(values, Mapping) and all(isinstance(v, Tensor) for v in values.values()):
        return {str(k): _as_arrays(v) for k, v in values.items()}
    return None
