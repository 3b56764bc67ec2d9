"""The trained model as MLflow keeps it: with a signature, loadable by `mlflow.pytorch.load_model`."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfdist.tracking.spool import Event, Spool


def save_model(model: nn.Module, example_inputs: Any, path: Path) -> None:
    """Save a model in MLflow's format, on the host and in evaluation mode.

    Args:
        model: Stays as it is.
        example_inputs: What it takes, a batch of one: a tensor, or a mapping of tensors; None: unknown.
        path: A folder that does not exist.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    twin = copy.deepcopy(model).cpu().eval()
    signature = None
    if example_inputs is not None:
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                outputs = twin(**example_inputs)
            else:
                outputs = twin(example_inputs)
        inputs, returned = _as_arrays(example_inputs), _as_arrays(outputs)
        if inputs is not None and returned is not None:
            signature = infer_signature(inputs, returned)
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            twin,
            str(path),
            signature=signature,
            # Exported graphs take neither dicts nor other batch sizes.
            serialization_format="pickle",
            code_paths=_own_code(model) or None,
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )


def send_model(
    client: Any, run_id: str, spool: Spool, event: Event, target: Mapping[str, Any]
) -> None:
    """Make a logged model of the run, and a registered version if the job asks for one. Calling it again
    goes on where the last call ended."""
    from mlflow.entities import LoggedModelOutput

    known = spool.recall("model")
    if known.get("time") != event["time"]:
        experiment_id = spool.recall("run")["experiment_id"]
        made = client.create_logged_model(
            experiment_id=experiment_id, name="model", source_run_id=run_id
        )
        known = {"time": event["time"], "model_id": made.model_id}
        spool.remember("model", known)
    model_id = known["model_id"]
    client.log_model_artifacts(model_id, event["path"])
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, event["step"])])
    name = target.get("registered_model")
    if not name:
        return
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if "version" not in known:
        version = client.create_model_version(
            name, f"models:/{model_id}", run_id=run_id, model_id=model_id
        )
        known["version"] = str(version.version)
        spool.remember("model", known)
    if target.get("model_alias"):
        client.set_registered_model_alias(name, target["model_alias"], known["version"])
    if target.get("model_stage"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stages are deprecated, and still asked for
            client.transition_model_version_stage(name, known["version"], target["model_stage"])


def _as_arrays(values: Any) -> Any:
    """numpy arrays of a tensor or a flat mapping of tensors; None for what a signature cannot say."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, Mapping) and all(isinstance(v, Tensor) for v in values.values()):
        return {k: v.detach().cpu().numpy() for k, v in values.items()}
    return None


def _own_code(model: nn.Module) -> list[str]:
    """Files of modules that no package holds: a user's task.py must travel with the model."""
    files = set()
    for module in model.modules():
        source = sys.modules.get(type(module).__module__)
        file = getattr(source, "__file__", None)
        if file and "." not in type(module).__module__ and "site-packages" not in file:
            files.add(inspect.getfile(type(module)))
    return sorted(files)
