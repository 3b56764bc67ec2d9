"""Job files: what they may say, and what is said about those that are wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdist.config.job import RunConfig, from_dict, known_keys, load_config, schema, to_yaml
from hfdist.config.redaction import MASK
from hfdist.errors import ConfigError, StorageError
from hfdist.optim.options import PRESETS

TASK = "task: task.py:Own\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


# -- what is read


def test_defaults_are_filled_in(write: Any) -> None:
    config = load_config(write(TASK))
    assert config.name == "run"
    assert config.output == "runs"
    assert config.dtype == "float32"
    assert config.device == "auto"
    assert config.launch.workers == 1


def test_overrides_win_over_the_file_and_the_last_over_the_first(write: Any) -> None:
    path = write(TASK + "steps: 3\noptim:\n  damping: 2\n  lr: 0.5\n")
    config = load_config(path, ["steps=4", "optim.damping=1e-3", "steps=5", "launch.workers=2"])
    assert (config.steps, config.optim.damping, config.optim.lr) == (5, 1e-3, 0.5)
    assert config.launch.workers == 2


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001", "1E-3"])
def test_numbers_are_numbers_however_they_are_written(write: Any, text: str) -> None:
    in_file = load_config(write(TASK + f"optim:\n  damping: {text}\n"))
    by_override = load_config(write(TASK), [f"optim.damping={text}"])
    assert in_file.optim.damping == by_override.optim.damping == 1e-3


def test_override_values_are_yaml(write: Any) -> None:
    changes = [
        "task_args={a: 1, b: [x, 2.5]}",
        "batches.curvature=0.25",
        "optim.cg_max_iter=null",
        "optim.adapt_damping=false",
        "launch={backend: ray, workers: [1, 4]}",
        "name='a: b'",
    ]
    config = load_config(write(TASK), changes)
    assert config.task_args == {"a": 1, "b": ["x", 2.5]}
    assert config.batches.curvature == 0.25
    assert config.optim.cg_max_iter is None
    assert config.optim.adapt_damping is False
    assert config.launch.workers == (1, 4)
    assert config.name == "a: b"


def test_a_task_in_a_file_is_looked_for_beside_the_job(
    write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = write(TASK)
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(path.relative_to(tmp_path.parent))
    assert config.task == f"{tmp_path / 'task.py'}:Own"
    assert load_config(write("task: /other/task.py:Own")).task == "/other/task.py:Own"
    assert load_config(write("task: package.module:Own")).task == "package.module:Own"


def test_a_preset_lies_under_the_explicit_keys(write: Any) -> None:
    path = write(TASK + "optim:\n  preset: seed\n  linesearch_max_iter: 7\n")
    config = load_config(path)
    assert config.optim.linesearch_max_iter == 7
    for key, value in PRESETS["seed"].items():
        if key != "linesearch_max_iter":
            assert getattr(config.optim, key) == value
    assert load_config(path, ["optim.preset=default"]).optim.cg_stop == "martens"


def test_an_empty_section_has_the_defaults(write: Any) -> None:
    config = load_config(write(TASK + "optim:\n  # damping: 1\ntask_args:\nlaunch: null\n"))
    assert config == load_config(write(TASK))


def test_references_are_followed_after_the_overrides(write: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOW_MANY", "3")
    path = write(TASK + "evaluate:\n  every: ${steps}\nseed: ${oc.env:HOW_MANY}\n")
    config = load_config(path, ["steps=12"])
    assert config.evaluate.every == 12
    assert config.seed == 3


def test_names_may_be_numbers(write: Any) -> None:
    config = load_config(write(TASK + "name: 12\n"), ["tracking.tags.year=2026"])
    assert config.name == "12"
    assert config.tracking.tags == {"year": "2026"}


# -- what is written


def test_every_shipped_job_is_valid_and_survives_a_round_trip(tmp_path: Path) -> None:
    jobs = sorted((Path(__file__).parents[3] / "deploy" / "jobs").glob("*.yaml"))
    assert jobs
    for job in jobs:
        config = load_config(job)
        config.save(tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


keys = st.text("abcdefgh_", min_size=1, max_size=8)
texts = st.text("abeE0123456789+-_.:#'\"\\ ${}[]~!&*%@`|>,?=\n\té", max_size=12) | st.sampled_from(
    ["true", "no", "null", "~", "1e3", "0x1f", "2026-01-01", "12:30:00", "${steps}", "a: b", " x "]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | texts.filter(lambda text: text != "???"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(
    name=texts.filter(bool),
    task_args=st.dictionaries(keys, values, max_size=4),
    damping=st.just(0.0) | st.floats(1e-12, 3e5),
    damping_max=st.sampled_from([1e12, math.inf, 3.0e5]),
    preset=st.sampled_from(list(PRESETS)),
    curvature=st.none() | st.integers(1, 10**9) | st.floats(1e-9, 1),
    workers=st.integers(1, 64) | st.just([2, 8]),
    tags=st.dictionaries(keys, texts, max_size=3),
)
def test_a_saved_job_is_loaded_equal(
    tmp_path_factory: Any,
    name: str,
    task_args: dict[str, Any],
    damping: float,
    damping_max: float,
    preset: str,
    curvature: int | float | None,
    workers: Any,
    tags: dict[str, str],
) -> None:
    config = from_dict(
        {
            "name": name,
            "task": "package.module:Class",
            "task_args": task_args,
            "optim": {"damping": damping, "damping_max": damping_max, "preset": preset},
            "batches": {"curvature": curvature},
            "launch": {"workers": workers, "backend": "ray"},
            "tracking": {"tags": tags},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    config.save(path)
    loaded = load_config(path)
    assert loaded == config
    assert repr(loaded) == repr(config)  # 1 and 1.0 are equal, but not the same


def test_flatten_gives_dotted_keys_and_plain_values(write: Any) -> None:
    flat = load_config(write(TASK), ["task_args={a: {b: 1}}", "optim.preset=seed"]).flatten()
    assert flat["task_args.a.b"] == 1
    assert flat["optim.damping_max"] == math.inf
    assert flat["launch.resources"] == {}
    assert flat["batches.gradient"] is None


def test_jobs_made_in_python_are_saved_as_plain_yaml(tmp_path: Path) -> None:
    config = RunConfig(task="a:B", task_args={"folder": Path("/x/y"), "shape": (1, 2)})
    config.save(tmp_path / "config.yaml")
    assert "!!" not in (tmp_path / "config.yaml").read_text()
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded.task_args == {"folder": "/x/y", "shape": [1, 2]}


def test_saving_where_nothing_can_be_written_is_a_storage_error(write: Any) -> None:
    path = write(TASK)
    with pytest.raises(StorageError, match=r"config\.yaml"):
        load_config(path).save(path / "config.yaml")


def test_the_schema_describes_every_key() -> None:
    described = json.loads(json.dumps(schema(), allow_nan=False))
    assert set(described["properties"]) == set(RunConfig.model_fields)
    for section in ("optim", "batches", "launch", "checkpoint", "tracking", "evaluate"):
        reference = described["properties"][section]["$ref"].rpartition("/")[2]
        for key, field in described["$defs"][reference]["properties"].items():
            assert field.get("description"), f"{section}.{key} has no description"
            assert f"{section}.{key}" in known_keys()


# -- secrets


@pytest.mark.parametrize(
    "key", ["password", "api_key", "apikey", "hub_token", "token", "client_secret", "db.passwd"]
)
def test_secrets_are_in_no_record(write: Any, tmp_path: Path, key: str) -> None:
    config = load_config(write(TASK), [f"task_args.{key}=hunter2"])
    config.save(tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in str(config.to_dict())
    assert config.flatten()[f"task_args.{key}"] == MASK
    assert "hunter2" in str(config.task_args)  # the task itself gets it
    with pytest.raises(ConfigError, match=f"task_args.{key}"):
        load_config(tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", [f"task_args.{key}=hunter2"])
    assert again.task_args == config.task_args


def test_a_secret_of_the_environment_is_saved_as_a_reference(
    write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HUB", "hunter2")
    config = load_config(write(TASK + "task_args:\n  hub_token: ${oc.env:HUB}\n"))
    config.save(tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml").task_args == {"hub_token": "hunter2"}


@pytest.mark.parametrize(
    "pair", ["num_tokens=512", "pad_token='<pad>'", "tokenizer=gpt2", "keys=3", "token=7"]
)
def test_tokens_of_language_models_are_no_secrets(write: Any, pair: str) -> None:
    assert MASK not in to_yaml(load_config(write(TASK), [f"task_args.{pair}"]))


# -- what is wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [1\nname: x\n", ["job.yaml", "line 2", "YAML"]),
        ("task: a\nsteps: 1\nsteps: 2\n", ["line 3", "duplicate", "steps"]),
        ("- a\n- b\n", ["key: value"]),
        ("", ["'task' is missing"]),
        (TASK + "name: ${nothing}\n", ["name", "nothing"]),
    ],
)
def test_files_that_are_no_jobs(write: Any, text: str, words: list[str]) -> None:
    _refused(write(text), [], words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # unknown keys
        ("step=3", ["unknown key 'step'", "'steps'"]),
        ("optim.dampin=3", ["unknown key 'optim.dampin'", "'optim.damping'"]),
        ("damping=3", ["unknown key 'damping'", "'optim.damping'"]),
        ("launch.keep=3", ["unknown key 'launch.keep'", "'checkpoint.keep'"]),
        ("batch.gradient=3", ["unknown key 'batch'", "'batches'"]),
        ("xyzzy=3", ["unknown key 'xyzzy'", "hfdist schema"]),
        # types
        ("steps=abc", ["steps is 'abc'", "whole number"]),
        ("steps=2.5", ["steps is 2.5", "whole number"]),
        ("steps=true", ["steps is true", "number"]),
        ("optim.damping=high", ["optim.damping is 'high'", "a number"]),
        ("optim.damping=false", ["optim.damping is false", "a number"]),
        ("optim.adapt_damping=maybe", ["optim.adapt_damping is 'maybe'", "true or false"]),
        ("optim=fast", ["optim is 'fast'", "section"]),
        ("name=[a]", ["name is ['a']", "text"]),
        ("task_args=3", ["task_args is 3", "section"]),
        ("launch.workers=x", ["launch.workers is 'x'", "whole number", "[min, max]"]),
        ("launch.workers=[1,a]", ["launch.workers is [1, 'a']", "[min, max]"]),
        ("launch.resources.tpu=a", ["launch.resources.tpu is 'a'", "number"]),
        ("batches.curvature=lots", ["batches.curvature is 'lots'", "number"]),
        # ranges and choices
        ("steps=-1", ["steps is -1", "at least 0"]),
        ("optim.damping=-1", ["optim.damping is -1", "at least 0"]),
        ("optim.preset=sed", ["optim.preset is 'sed'", "'pytorch_hessianfree' or 'seed'"]),
        ("optim.preset=[a]", ["optim.preset is ['a']", "'pytorch_hessianfree' or 'seed'"]),
        ("dtype=bfloat16", ["dtype is 'bfloat16'", "optim.product_autocast=bfloat16"]),
        ("tf32=maybe", ["tf32 is 'maybe'", "true or false"]),
        ("dtype=float16", ["dtype is 'float16'", "'float32' or 'float64'"]),
        ("device=gpu", ["device is 'gpu'", "cuda:N"]),
        ("device=meta", ["device is 'meta'", "cuda:N"]),
        ("device=cpu:1", ["device is 'cpu:1'", "cuda:N"]),
        ("name=''", ["name is ''"]),
        ("batches.gradient=0", ["batches.gradient is 0", "at least 1"]),
        ("checkpoint.keep=0", ["checkpoint.keep is 0", "at least 1"]),
        # overrides
        ("steps", ["'steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("steps=[1", ["steps=[1", "YAML", "quotes"]),
        ("task.file=3", ["task.file=3", "task is no section"]),
    ],
)
def test_one_message_names_key_value_and_mend(write: Any, change: str, words: list[str]) -> None:
    _refused(write(TASK), [change], words)


def test_secrets_are_not_in_messages(write: Any) -> None:
    for change in ("tracking.api_key=hunter2", "task_args.token=[hunter2", "name.password=hunter2"):
        with pytest.raises(ConfigError) as caught:
            load_config(write(TASK + "name: x\n"), [change])
        assert "hunter2" not in str(caught.value)


def test_an_unknown_key_is_told_before_what_it_leaves_missing(write: Any) -> None:
    _refused(write("tsk: a.py:B\n"), [], ["'tsk'", "'task'"])


def test_a_dotted_key_in_a_file_is_explained(write: Any) -> None:
    _refused(write(TASK + "optim.damping: 1\n"), [], ["`optim:`", "`damping:`"])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    _refused(tmp_path / "no.yaml", [], ["no.yaml", "does not exist"])
    _refused(tmp_path, [], ["folder"])


def _refused(path: Path, changes: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
