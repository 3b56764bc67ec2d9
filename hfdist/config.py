"""A job: YAML plus `key=value` overrides, validated; every section is defined beside what it configures."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from yaml import YAMLError

from hfdist.checkpoint.config import CheckpointConfig
from hfdist.data import BatchesConfig
from hfdist.errors import ConfigError, StorageError
from hfdist.evaluation import EvaluateConfig
from hfdist.launch.config import LaunchConfig
from hfdist.optim.options import PRESETS, HFOptions
from hfdist.tracking.config import TrackingConfig

CONFIG_FILE = "config.yaml"
"""Name of the resolved job in a run's folder."""

_SECRET = re.compile(r"(password|passwd|secret|token|api_?key|credential)", re.IGNORECASE)
MASK = "********"


class RunConfig(BaseModel):
    """Everything that defines a run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, title="hfdist job"
    )

    name: str = Field(default="run", min_length=1)
    """Name of the run; the first part of its id."""
    task: str = Field(min_length=1)
    """What to train: package.module:Class, or file.py:Class beside the job file."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's constructor."""
    steps: int = Field(default=50, ge=0)
    """Hessian-free steps."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initialisation, of the order of the data and of dropout."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU: cuda:1."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and data."""
    output: str = "runs"
    """Folder of the runs."""
    optim: HFOptions = Field(default_factory=HFOptions)
    """Rules of the Hessian-free step."""
    batches: BatchesConfig = Field(default_factory=BatchesConfig)
    """Examples a step sees, by role."""
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """How workers are started."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When checkpoints are written."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Where the run is recorded."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """When held-out data is looked at."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Put the preset's rules under the ones that are given."""
        if not isinstance(values, Mapping) or not isinstance(values.get("optim"), Mapping):
            return values
        optim = values["optim"]
        rules = PRESETS.get(optim.get("preset", "default"), {})
        return {**values, "optim": {**rules, **optim}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in YAML."""
        return TypeAdapter(RunConfig).dump_python(self, mode="json")

    def flatten(self) -> dict[str, Any]:
        """{"optim.damping": 1.0, ...}; secrets are masked."""
        return dict(_flat(self.to_dict(), ""))

    def save(self, path: Path) -> None:
        """Write the job as YAML; `load_config` reads it back equal.

        Raises:
            StorageError: The file cannot be written.
        """
        from hfdist.record import write_atomically

        write_atomically(path, to_yaml(self))

    @classmethod
    def from_run(cls, run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """The resolved job of a run's folder.

        Raises:
            ConfigError: It is no run's folder, or its job is not valid.
        """
        path = Path(run_dir) / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(f"{run_dir} is no run's folder: it has no {CONFIG_FILE}")
        return load_config(path, overrides)


def to_yaml(config: RunConfig) -> str:
    """The resolved job as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a job file, apply overrides, validate.

    Args:
        path: The YAML file. A task named by file is looked for beside it.
        overrides: `key=value` each; keys are dotted, values are YAML.

    Raises:
        ConfigError: One message that names the file or key at fault and the mend.
    """
    path = Path(path)
    values = _read(path)
    for override in overrides:
        _apply(values, override)
    config = from_dict(values, str(path))
    return _with_task_beside(config, path.parent)


def from_dict(values: Mapping[str, Any], where: str = "the job") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, values)}") from error


def schema() -> dict[str, Any]:
    """JSON schema of a job file, for editors."""
    return RunConfig.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema"
    }


def known_keys() -> list[str]:
    """All dotted keys."""
    example = RunConfig(task="module:Class").to_dict()
    sections = [key for key, value in example.items() if isinstance(value, dict) and value]
    return [*example, *(f"{s}.{key}" for s in sections for key in example[s])]


# -- reading -----------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"job file {path} does not exist")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"job file {path}{line} is no valid YAML: {problem}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"job file {path} must hold key: value pairs, like `task: digits.py:Task`"
        )
    return {str(key): value for key, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip().lstrip("+")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, like optim.damping=0.1")
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"override {mask_override(override)!r}: the value is no valid YAML: quote it"
        ) from error
    *sections, last = key.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is no section")
        place = inner
    place[last] = value


def _with_task_beside(config: RunConfig, folder: Path) -> RunConfig:
    where, _, name = config.task.rpartition(":")
    if not where.endswith(".py"):
        return config
    file = Path(where)
    if not file.is_absolute():
        file = (folder / file).resolve()
    return config.model_copy(update={"task": f"{file}:{name}"})


# -- messages ----------------------------------------------------------------------------------------


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"] if part not in ("int", "float", "str", "bool")]
    # Parts that pydantic adds for the branches of a union are no keys.
    place = [part for part in place if not part.startswith(("tuple[", "function-", "literal["))]
    key = ".".join(place)
    kind = problem["type"]
    more = "" if len(error.errors()) == 1 else f" (and {len(error.errors()) - 1} more)"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}{_nearest(key)}{more}"
    if kind == "missing":
        return f"key {key!r} is missing{more}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}.{message}{more}" if key in _sections() else f"{key}: {message}{more}"
    shown = MASK if _SECRET.search(key) else repr(problem.get("input"))
    return f"{key} is {shown}: {message[0].lower()}{message[1:]}{more}"


def _sections() -> set[str]:
    return {"optim", "batches", "launch", "checkpoint", "tracking", "evaluate"}


def _nearest(key: str) -> str:
    keys = known_keys()
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not found:  # perhaps the right name in the wrong section
        last = key.rpartition(".")[2]
        by_last = {k.rpartition(".")[2]: k for k in keys}
        near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
        found = [by_last[near[0]]] if near else []
    return f": did you mean {found[0]!r}?" if found else " (see `hfdist schema` for all keys)"


def mask_override(override: str) -> str:
    """An override that may be shown: the value of a secret is masked."""
    key, equals, _ = override.partition("=")
    return f"{key}{equals}{MASK}" if _SECRET.search(key) else override


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{name}.")
        else:
            pairs.append((name, MASK if _SECRET.search(str(key)) and value else value))
    return pairs


__all__ = ["ConfigError", "RunConfig", "StorageError", "from_dict", "load_config", "schema"]
