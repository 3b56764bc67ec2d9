"""A job: YAML plus `key=value` overrides, validated; every section is defined beside what it configures."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from hfdist.addresses import has_user_information, is_all_reference
from hfdist.config.checkpoint import CheckpointConfig
from hfdist.config.evaluate import EvaluateConfig
from hfdist.config.launch import LaunchConfig
from hfdist.config.limits import MAX_DEPTH, check_references, check_size, what_is_wrong
from hfdist.config.messages import explain, short
from hfdist.config.notify import NotifyConfig
from hfdist.config.redaction import MASK, flatten, is_secret, masked, masked_override
from hfdist.config.tracking import TrackingConfig
from hfdist.data.config import BatchesConfig
from hfdist.errors import ConfigError, first_line
from hfdist.optim.options import PRESETS, HFOptions, current
from hfdist.rundir import files
from hfdist.rundir.files import write_atomically
from hfdist.rundir.locations import normal

_SECTIONS = ("optim", "batches", "launch", "checkpoint", "tracking", "evaluate", "notify")
_OF_VALUES = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What the YAML libraries let through of a value that cannot be made: a date of month 13, 5000 digits."""


class RunConfig(BaseModel):
    """Everything that defines a run."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,  # a run may be named 12
        title="hfdist job",
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
    """auto (GPUs where there are any, else the CPU), cpu, cuda, or one GPU, cuda:1; xpu likewise."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and data. Products in bfloat16: `optim.product_autocast`."""
    tf32: bool = False
    """Let NVIDIA's GPUs round the factors of float32's matrix products and convolutions to TF32's 11 bits:
    faster, but losses and products then carry that rounding."""
    deterministic: bool = False
    """The same bits whenever the job is run on the same device: kernels that add up in a changing order are
    replaced by slower ones, or are an error where torch has none."""
    output: str = Field(default="runs", min_length=1)
    """Folder of the runs, or an address that fsspec knows, like s3://BUCKET/PREFIX."""
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
    notify: NotifyConfig = Field(default_factory=NotifyConfig)
    """Who is told how the run ends."""

    _references: dict[str, str] = PrivateAttr(default_factory=dict)
    """Secrets that the job takes from elsewhere: {"task_args.token": "${oc.env:TOKEN}"}."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """Put the preset's rules under the ones that are given; an empty section has the defaults."""
        if not isinstance(values, Mapping):
            return values
        empty = [key for key in (*_SECTIONS, "task_args") if values.get(key, ...) is None]
        values = {key: value for key, value in values.items() if key not in empty}
        optim = values.get("optim")
        if isinstance(optim, Mapping) and isinstance(optim.get("preset"), str):
            values["optim"] = {**PRESETS.get(optim["preset"], {}), **optim}
        return values

    @field_validator("dtype", mode="before")
    @classmethod
    def _check_dtype(cls, dtype: Any) -> Any:
        if dtype == "bfloat16":
            raise ValueError(
                "dtype is 'bfloat16': steps would be lost in the last of 8 bits; keep float32, and set "
                "optim.product_autocast=bfloat16 for products of that type"
            )
        return dtype

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if device == "auto":
            return device
        try:
            found = torch.device(device)
        except RuntimeError:
            found = torch.device("meta")
        if found.type == "meta" or (found.type == "cpu" and device != "cpu"):
            raise ValueError(
                f"device is {device!r}: it must be auto, cpu, cuda or cuda:N, or another accelerator that "
                "torch knows, like xpu"
            )
        return device

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        try:
            return normal(output)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"output is {error}") from error

    @model_validator(mode="after")
    def _check_memory(self) -> RunConfig:
        """fsspec's memory:// is the memory of one process."""
        launch = self.launch
        is_alone = launch.backend == "local" and launch.max_workers == 1 and not launch.max_failures
        if self.output.startswith("memory://") and not is_alone:
            raise ValueError(
                f"output is {self.output}, which other processes do not see: choose a folder or an object "
                "store, or one local worker with launch.max_failures=0"
            )
        return self

    @model_validator(mode="after")
    def _check_values(self) -> RunConfig:
        """What no key may hold, whatever its section; a task's arguments are the task's affair."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values |= {name: dataclasses.asdict(values[name]) for name in _SECTIONS}
        for key, value in flatten(values):
            problem = what_is_wrong(key, value)
            if problem:
                raise ValueError(f"{key} {problem}")
        if self.optim.lr == 0.0:
            raise ValueError("optim.lr is 0: no step would move; it must be above 0")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in YAML; secrets are masked."""
        return masked(_plain(self))

    def flatten(self) -> dict[str, Any]:
        """{"optim.damping": 1.0, ...}; secrets are masked."""
        return dict(flatten(self.to_dict()))

    def save(self, path: Path) -> None:
        """Write the job as YAML; `load_config` reads it back equal.

        A secret is written as a reference to where the job has it from, `${oc.env:NAME}`, or masked:
        whoever loads the file has to give it again.

        Raises:
            StorageError: The file cannot be written.
        """
        write_atomically(path, to_yaml(self))

    @classmethod
    def from_run(cls, run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """The resolved job of a run's folder.

        Raises:
            ConfigError: It is no run's folder, or its job is not valid.
        """
        path = Path(run_dir) / files.JOB
        if not path.is_file():
            raise ConfigError(f"{run_dir} is no run's folder: it has no {files.JOB}")
        return load_config(path, overrides)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a job file, apply overrides, validate.

    Args:
        path: The YAML file. A task named by file is looked for beside it.
        overrides: `key=value` each; keys are dotted, values are YAML.

    Raises:
        ConfigError: One message that names the file or key at fault and the fix.
    """
    path = Path(path)
    written = _read(path)
    for override in overrides:
        _apply(written, override)
    values = _resolve(written, path)
    for key, value in flatten(values):
        if (is_secret(key) and MASK in str(value)) or f"://{MASK}@" in str(value):
            raise ConfigError(
                f"{path}: {key} is a secret and was not written down: give it again, {key}=..., or "
                f"let the job take it from the environment ({key}: ${{oc.env:NAME}})"
            )
    config = from_dict(values, str(path))
    plain = dict(flatten(_plain(config)))
    config._references.update(
        (key, value)
        for key, value in flatten(written)
        if (is_secret(key, value) and "${" in value.replace("\\${", ""))
        or (has_user_information(str(plain.get(key))) and is_all_reference(str(value)))
    )
    return _with_task_beside(config, path.parent)


def merged(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain values with `key=value` overrides on top.

    Raises:
        ConfigError: As `load_config`.
    """
    written = copy.deepcopy(dict(values))
    for override in overrides:
        _apply(written, override)
    return written


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A job with `key=value` changes.

    Raises:
        ConfigError: As `load_config`.
    """
    return from_dict(merged(_plain(config), overrides))


def from_dict(values: Mapping[str, Any], where: str = "the job") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: As `load_config`.
    """
    if isinstance(values.get("optim"), Mapping):
        values = {**values, "optim": current(values["optim"])}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, known_keys())}") from error
    # To pydantic true is a 1, as to Python; in a job it is a mistake.
    plain = dict(flatten(_plain(config)))
    for key, value in flatten(values):
        if isinstance(value, bool) and not isinstance(plain.get(key, value), bool):
            raise ConfigError(f"{where}: {key} is {str(value).lower()}: it must be a number")
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved job as YAML text; secrets as in `RunConfig.save`."""
    values = _escaped(config.to_dict())
    for key, reference in config._references.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = reference
    return OmegaConf.to_yaml(OmegaConf.create(values))


def schema() -> dict[str, Any]:
    """JSON schema of a job file, for editors."""
    described = RunConfig.model_json_schema()
    # pydantic reads the docstrings of a class's own fields only: those of HFOptions are its groups'.
    fields = described["$defs"][HFOptions.__name__]["properties"]
    for group in HFOptions.__mro__[:-1]:
        for key, field in TypeAdapter(group).json_schema()["properties"].items():
            if "description" in field:
                fields[key]["description"] = field["description"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


@cache
def known_keys() -> tuple[str, ...]:
    """All dotted keys, the sections' own names included."""
    example = RunConfig(task="module:Class").to_dict()
    return (*example, *(f"{section}.{key}" for section in _SECTIONS for key in example[section]))


# -- reading -----------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """The file's values, references not yet followed."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a job file in it")
    if not path.is_file():
        raise ConfigError(f"job file {path} does not exist")
    try:
        check_size(path.read_text(), f"job file {path}")
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        # OmegaConf raises one without a number for a file that holds a single text.
        if error.errno is not None:
            raise ConfigError(f"job file {path} cannot be read: {error.strerror}") from error
        values = None
    except (YAMLError, OmegaConfBaseException, *_OF_VALUES) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"job file {path}{line} is no valid YAML: {problem}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"job file {path} must hold `key: value` lines, like `task: digits.py:Task`"
        )
    return {str(key): value for key, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    shown = short(masked_override(override))
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {shown!r}: write key=value, like optim.damping=0.1")
    check_size(text, f"override {shown!r}")
    try:
        parsed: Any = OmegaConf.create(f"value: {text}")
        value = OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException, IndexError, *_OF_VALUES) as error:
        raise ConfigError(
            f"override {shown!r}: the value is no valid YAML: put it in quotes"
        ) from error
    *sections, last = key.split(".")
    if len(sections) > MAX_DEPTH:
        raise ConfigError(f"override {shown!r}: more than {MAX_DEPTH} levels")
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        if not isinstance(place[section], dict):
            raise ConfigError(f"override {shown!r}: {section} is no section")
        place = place[section]
    place[last] = value


def _resolve(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Follow references (`${steps}`, `${oc.env:NAME}`), after the overrides."""
    check_references(dict(flatten(values)), str(path))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, *_OF_VALUES) as error:
        full_key = getattr(error, "full_key", None)
        key = f"{full_key}: " if full_key else ""
        raise ConfigError(f"{path}: {key}{first_line(error)}") from error
    return {str(key): value for key, value in resolved.items()}  # type: ignore[union-attr]


def _with_task_beside(config: RunConfig, folder: Path) -> RunConfig:
    where, _, name = config.task.rpartition(":")
    if not where.endswith(".py"):
        return config
    try:
        file = (folder / Path(where).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"task is {config.task!r}: {first_line(error)}") from error
    return config.model_copy(update={"task": f"{file}:{name}"})


# -- writing -----------------------------------------------------------------------------------------


def _plain(config: RunConfig) -> dict[str, Any]:
    # Not as JSON, which has no infinity.
    return _as_yaml_types(TypeAdapter(RunConfig).dump_python(config, mode="python"))


def _as_yaml_types(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _as_yaml_types(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_as_yaml_types(value) for value in values]
    return str(values) if isinstance(values, PurePath) else values


def _escaped(values: Any) -> Any:
    """So that a text with `${` in it is read back as that text."""
    if isinstance(values, dict):
        return {key: _escaped(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_escaped(value) for value in values]
    # Backslashes before it would escape the escape: they are doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values
