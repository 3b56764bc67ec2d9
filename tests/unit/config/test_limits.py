"""What no job holds: endless or contradictory numbers, texts that take minutes to read, passwords."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfdist.addresses import without_user_information
from hfdist.config.job import from_dict, load_config
from hfdist.config.redaction import masked
from hfdist.errors import ConfigError, UserError
from hfdist.launch.group import run_group
from hfdist.optim.options import HFOptions

SECTIONS = ("optim", "batches", "launch", "checkpoint", "tracking", "evaluate")
TASK = "task: package.module:Class\n"


def job(**values: Any) -> Any:
    return from_dict({"task": "package.module:Class", **values})


def number_keys() -> list[tuple[str, str]]:
    plain = job().to_dict()
    return [
        (section, key)
        for section in SECTIONS
        for key, value in plain[section].items()
        if isinstance(value, float)
        or (value is None and key in ("placement_timeout", "gpus_per_worker"))
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "key"), number_keys(), ids=lambda part: str(part))
def test_numbers_are_finite(section: str, key: str, value: float) -> None:
    if (key, value) == ("damping_max", math.inf):  # no bound: a preset has it
        assert job(optim={"damping_max": value}).optim.damping_max == value
        return
    with pytest.raises(ConfigError, match=key):
        job(**{section: {key: value}})


def test_numbers_in_lists_and_mappings_are_finite() -> None:
    with pytest.raises(ConfigError, match=r"launch\.resources\.x"):
        job(launch={"resources": {"x": math.inf}, "backend": "ray"})
    assert math.isinf(job(task_args={"bound": math.inf}).task_args["bound"])  # the task's affair


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 10.0, "damping_max": 1.0},
        {"damping": 0.5, "damping_min": 1.0},
        {"damping_min": 2.0, "damping_max": 1.0},
        {"reduction_ratio_low": 0.8},
        {"cg_decay_x0": 0.9, "cg_decay_x0_max": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_contradictions_are_told(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        HFOptions(**options)
    with pytest.raises(ConfigError, match=next(iter(options))):
        job(optim=options)


def test_a_job_whose_steps_have_no_length_is_refused() -> None:
    HFOptions(lr=0.0)  # a scheduler in a loop of one's own may begin there
    with pytest.raises(ConfigError, match=r"optim\.lr is 0"):
        job(optim={"lr": 0.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [("damping", "x"), ("damping", True), ("cg_max_iter", 2.5), ("cg_tol", [1])],
)
def test_options_from_python_have_types(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} is"):
        HFOptions(**{key: value})


@pytest.mark.parametrize(
    "key", ["steps", "seed", "evaluate.every", "checkpoint.keep", "batches.gradient"]
)
def test_whole_numbers_have_an_end(key: str) -> None:
    section, _, name = key.rpartition(".")
    values = {section: {name: 10**30}} if section else {name: 10**30}
    with pytest.raises(ConfigError, match=rf"{key}.*1e30|{key}"):
        job(**values)


def test_workers_have_a_limit_before_anything_is_started(tmp_path: Path) -> None:
    for value in (99999999999999999999999, 70_000):
        with pytest.raises(ConfigError, match=r"launch\.workers is \d+: at most 65536"):
            job(launch={"workers": value})
    config = job(launch={"workers": 60_000})
    with pytest.raises(
        ConfigError, match=r"launch.workers is 60000, but this machine has \d+ cores"
    ):
        run_group(config, run_dir=tmp_path, resume=False, display="quiet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key",
    [
        "launch.timeout_seconds",
        "launch.placement_timeout",
        "tracking.finish_timeout",
        "tracking.system_metrics_every",
    ],
)
def test_times_fit_into_timers(key: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"{key} is 1e\+300 seconds"):
        job(**{section: {name: 1e300}})


def test_threads_have_a_limit() -> None:
    with pytest.raises(ConfigError, match=r"threads_per_worker is 999999999: it must be from 1 to"):
        job(launch={"threads_per_worker": 999_999_999})


# -- texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: " + "9" * 6000, "valid YAML"),
        ("task_args: " + "[" * 3000 + "]" * 3000, "50 levels"),
        ("task_args:\n" + "".join(f"{' ' * k}k:\n" for k in range(1, 90)), "50 levels"),
        ("task_args: {x: [" + ",".join("1" * 20_000) + "]}", "10000 values"),
        ("# " + "x" * 2_000_000, "characters"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
            ),
            "10000 values",
        ),
        ("".join(f"k{i}: '${{k{i + 1}}}${{k{i + 1}}}'\n" for i in range(40)), "references"),
        ("name: ${output}\noutput: ${name}", "circle: name -> output -> name"),
        ("name: ${.name}", "circle"),
    ],
    ids=lambda text: text[:20],
)
def test_what_takes_minutes_to_read_is_refused_at_once(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(TASK + text + "\n")
    began = time.process_time()
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert time.process_time() - began < 5.0
    assert len(str(caught.value)) < 1000


def test_values_on_the_command_line_have_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(TASK)
    for override in (
        "task_args.x=" + "[" * 3000,
        "steps=" + "9" * 6000,
        ".".join("a" * 400) + "=1",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [override])
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["name", "task", "output", "tracking.experiment"])
def test_characters_that_files_do_not_take_are_told(key: str, value: str) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError):
        from_dict({"task": "a:B"} | ({section: {name: value}} if section else {name: value}))


# -- addresses

ADDRESSES = [
    ("postgres://u:PW@h/x", "postgres://********@h/x"),
    ("https://PW@host/x", "https://********@host/x"),
    ("redis://:PW@h:1/0", "redis://********@h:1/0"),
    ("mysql+pymysql://u:p@PW@h:3/x?a=b", "mysql+pymysql://********@h:3/x?a=b"),
    ("postgres://u:a/PW@h/x", "postgres://********@h/x"),
    ("dsn is amqp://u:PW@h, really", "dsn is amqp://********@h, really"),
]
NO_SECRETS = [
    *("http://h:80/a@b", "s3://bucket/a@b", "http://h/@u/x", "a@b.org", "http://[::1]:80/a@b"),
    *("https://h?mail=a@b", "sqlite:////tmp/x@y.db"),
]


@pytest.mark.parametrize(("address", "shown"), ADDRESSES)
def test_user_information_is_masked_wherever_it_stands(
    tmp_path: Path, address: str, shown: str
) -> None:
    assert without_user_information(address) == shown
    assert without_user_information(shown) == shown
    values = {"a": {"b": [address, {"c": address}]}, "d": 1}
    assert masked(values) == {"a": {"b": [shown, {"c": shown}]}, "d": 1}
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({"task": "a:B", "task_args": {"url": address, "all": [address]}})
    )
    config = load_config(path)
    assert config.task_args == {"url": address, "all": [address]}
    config.save(tmp_path / "config.yaml")
    assert "PW" not in (tmp_path / "config.yaml").read_text()
    assert "PW" not in str(config.flatten())
    with pytest.raises(ConfigError, match=r"task_args\.\w+ is a secret"):
        load_config(tmp_path / "config.yaml")
    again = [f"task_args.url='{address}'", f"task_args.all=['{address}']"]
    assert load_config(tmp_path / "config.yaml", again).task_args == config.task_args
    assert "PW" not in str(UserError(f"cannot reach {address}"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"nothing.here={address}"])
    assert "PW" not in str(caught.value)


@pytest.mark.parametrize("address", NO_SECRETS)
def test_other_addresses_stay_as_they_are(address: str) -> None:
    assert without_user_information(address) == address


@pytest.mark.parametrize("key", ["name", "output", "tracking.experiment", "launch.address"])
def test_no_other_key_takes_user_information(key: str) -> None:
    section, _, name = key.rpartition(".")
    values = {section: {name: "x://u:PW@h/y"}} if section else {name: "x://u:PW@h/y"}
    with pytest.raises(ConfigError, match=key) as caught:
        job(**values)
    assert "PW" not in str(caught.value)


def test_a_reference_to_an_address_is_saved_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSN", "postgres://u:PW@h/x")
    monkeypatch.setenv("SECRET", "PW")
    path = tmp_path / "job.yaml"
    path.write_text(
        "task: a:B\ntask_args: {one: '${oc.env:DSN}', two: 'postgres://u:${oc.env:SECRET}@h/x'}\n"
    )
    config = load_config(path)
    config.save(tmp_path / "config.yaml")
    assert "PW" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml").task_args == config.task_args
