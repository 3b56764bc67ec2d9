"""Jobs, tasks and runs with something wrong in them, by number."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SECRET = "hunter2pw"

TASK = """
import sys
import torch
from torch import nn
from hfdist import Task
from hfdist.tasks.array_data import ArrayData

class Data(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index], self.y[index]

class Own(Task):
    def __init__(self, hidden=3, dsn="", scale=1.0):
        self.hidden, self.scale = hidden, scale
        self.x = torch.linspace(-1, 1, 12).reshape(-1, 1)
    def model(self):
        return nn.Sequential(nn.Linear(1, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))
    def forward(self, model, batch):
        return model(batch[0])
    def loss(self, outputs, batch):
        return self.scale * nn.functional.mse_loss(outputs, batch[1])
    def train_data(self):
        return Data(self.x, self.x.sin())
    def eval_data(self):
        return Data(self.x[:4], self.x[:4].sin())
    def metrics(self, outputs, batch):
        return {"error": (outputs - batch[1]).abs().mean()}
    def collate(self, examples):
        return super().collate(examples)
    def example_costs(self):
        return None
    def example_inputs(self, batch):
        return batch[0]
"""

JOB: dict[str, Any] = {
    "name": "own",
    "task": "task.py:Own",
    "task_args": {"hidden": 3, "dsn": f"postgres://me:{SECRET}@host/base"},
    "steps": 2,
    "output": "runs",
    "optim": {"damping": 1.0, "cg_max_iter": 3},
    "checkpoint": {"every": 1, "asynchronous": False},
    "tracking": {"enabled": False},
    "launch": {"workers": 1},
}

VALUES: list[Any] = [
    *(float("nan"), float("inf"), float("-inf"), 1e308, -1, 0, 0.5, -0.0, 1e-320),
    *(10**30, -(10**30), 2**63, 10**400, 1.0000000001, True, None, "", " ", "x", "1", "a" * 300),
    *(
        "\0",
        "a\0b",
        "../../etc",
        "/dev/null/x",
        "~nobody-there/x",
        "${steps}",
        "${nope}",
        "${",
        "\\${x}",
    ),
    *("${oc.env:NOT_THERE}", "${oc.decode:'['}", "s3://", "file://x", f"http://me:{SECRET}@host/x"),
    *(
        [],
        {},
        [1, 2, 3],
        [[]],
        {"a": {"b": 1}},
        {1: 2},
        ["x", None],
        "2020-13-45",
        "ünï ☃",
        "\ud800",
    ),
]
"""What may stand where something else is wanted."""

_NOT_TRAINED = (  # valid values of these are long runs, processes or servers
    *("steps", "launch", "launch.workers", "launch.max_failures", "launch.backend"),
    *("tracking", "tracking.enabled"),
)

BEHAVIOURS = (
    "raise ValueError('no such thing\\nat all')",
    "raise KeyError('')",
    "sys.exit(3)",
    "sys.exit('enough')",
    "raise RecursionError",
    "raise MemoryError",
    "return None",
    "return 'text'",
    "return 7",
    "return float('nan')",
    "return []",
    "return {}",
    "return {'a': 'b'}",
    "return {1: 2.0}",
    "return {'a': torch.ones(3)}",
    "return {'loss': 1.0}",
    "return torch.ones(3)",
    "return torch.tensor(float('inf'))",
    "return (torch.tensor(1.0), 0.0)",
    "return object()",
    f"raise OSError('cannot reach postgres://me:{SECRET}@host/base')",
)
METHODS = (
    *("__init__", "model", "forward", "loss", "train_data", "eval_data", "metrics", "collate"),
    *("example_costs", "example_inputs", "__len__", "__getitem__"),
)

TEXTS = (
    "",
    "just a text",
    "- a\n- list\n",
    "task: [\n",
    "task: task.py:Own\nsteps: " + "9" * 6000,
    "task: task.py:Own\ntask_args: " + "[" * 3000 + "]" * 3000,
    "task: task.py:Own\ntask_args:\n" + "".join(f"{' ' * k}k:\n" for k in range(1, 200)),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
    "task: task.py:Own\ntask_args: {x: [" + ",".join("1" * 200_000) + "]}",
    "task: task.py:Own\n# " + "x" * 2_000_000,
    "".join(f"k{i}: '${{k{i + 1}}}${{k{i + 1}}}'\n" for i in range(40)) + "k40: x\n",
    "name: ${name}\ntask: task.py:Own\n",
    "task: !!python/object/apply:os.system ['true']\n",
    "task: task.py:Own\nsteps: !!binary aGVsbG8=\n",
    "task: task.py:Own\nname: 2020-13-45\n",
    "task: task.py:Own\nname: 12:30:45\n",
    "task: task.py:Own\n<<: {steps: 2}\n",
    "task: task.py:Own\nsteps: 2\nsteps: 3\n",
    "? {a: b}\n: c\n",
    "task: task.py:Own\n\t steps: 3\n",
    "task: task.py:Own\n---\nsteps: 3\n",
    "%YAML 9.9\n---\ntask: x\n",
    "null: 1\ntrue: 2\n3: 4\n",
)

OVERRIDES = (
    *(
        "=",
        "=1",
        "steps",
        "steps=",
        "a.b.c=1",
        ".=1",
        "..=1",
        "optim.=1",
        ".steps=1",
        "task_args.=1",
    ),
    *(
        "steps=[",
        "steps='",
        "steps={a: 1",
        "name=a: b",
        "optim=3",
        "optim=null",
        "launch=[1]",
        "task=:",
    ),
    *("task=task.py", "task=task.py:", "task=:Own", "task=no_such_file.py:Own", "task=os:path"),
    *("task=no.such.module:X", "task=task.py:nn", "task=task.py:Data", "task=.:X", "task=..x:Y"),
    *("task=a b:c", "task=" + "a" * 300 + ".py:X", "task=~nobody-there/x.py:X", "task=/:X"),
    *("x" * 5000 + "=1", ".".join("a" * 400) + "=1", "steps=" + "9" * 5000, "seed=" + "9" * 30),
    *("name=" + "n" * 3000, "output=" + "o" * 300, "output=/proc/nowhere", "output=\0"),
    *("output=postgres://x", f"output=s3://me:{SECRET}@bucket/x", f"name=http://me:{SECRET}@host"),
    *("launch.workers=99999999999999999999999", "launch.workers=[1, 10]", "launch.workers=5000"),
    *("launch.threads_per_worker=999999999", "launch.timeout_seconds=1e300", "device=cuda:99"),
    *("optim.candidates_per_pass=999999999999", "optim.linesearch_max_iter=999999999999"),
    *(
        "optim.cg_stop_window=999999999999999",
        "optim.cg_grid_gamma=1.0000001",
        "optim.cg_max_iter=0",
    ),
    *("optim.damping=.inf", "optim.damping=1e300", "optim.damping_max=.inf", "optim.lr=1e300"),
    *("optim.reduction_ratio_low=0.9", "optim.damping_max=1e-3", "optim.damping_min=7"),
    *(
        "batches.gradient=13",
        "batches.curvature=1e-9",
        "batches.growth=1e300",
        "batches.microbatch=1",
    ),
    *("task_args.hidden=0", "task_args.hidden=-1", "task_args.hidden=x", "task_args.scale=.nan"),
    *("task_args.scale=.inf", "task_args.scale=1e38", "task_args.wdth=1", "task_args={1: 2}"),
    *("task_args.self=1", "task_args.scale=1" + "0" * 400, "task_args=[1]", "steps=0", "steps=-1"),
    *("dtype=float16", "checkpoint.keep=999999999999999999", "evaluate.batch=999999999999999999"),
)

RUN_IDS = (
    "../x",
    "a b/e",
    "",
    ".",
    "..",
    "-x",
    "x" * 300,
    "é",
    "a\nb",
    "a/b",
    "a\\b",
    "x;y",
    "%2e",
)

FILES_OF_A_RUN = ("config.yaml", "metrics.jsonl", "result.json", "manifest", "state", "tensors")


@dataclass
class Case:
    """A command and what is wrong with it."""

    words: list[str]
    why: str
    folder: Path
    has_secret: bool = field(default=False)


def make(number: int, folder: Path, run: Path) -> Case:
    """Write a case into an empty folder.

    Args:
        number: What the case is a function of.
        folder: Where the job and its task are written.
        run: The folder of a run that went well, which is copied and never touched.
    """
    rng = random.Random(number)
    kinds: list[tuple[int, Callable[..., Case]]] = [
        (5, _keys),
        (4, _task),
        (3, _override),
        (3, _text),
        (1, _bytes),
        (1, _run_id),
        (3, _damaged_run),
    ]
    kind = rng.choices([k for _, k in kinds], [w for w, _ in kinds])[0]
    return kind(rng, folder, run)


def _write(folder: Path, job: str | bytes, task: str = TASK) -> Path:
    (folder / "task.py").write_text(task)
    path = folder / "job.yaml"
    path.write_bytes(job if isinstance(job, bytes) else job.encode("utf-8", "surrogatepass"))
    return path


def _dumped(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, allow_unicode=True)


def _verb(rng: random.Random) -> str:
    return rng.choice(("config", "train"))


def _keys(rng: random.Random, folder: Path, run: Path) -> Case:
    """One or two keys with values that they should not have; keys that there are not."""
    from hfdist.config.job import known_keys

    verb = _verb(rng)
    values = json.loads(json.dumps(JOB))
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([k for k in known_keys() if verb == "config" or k not in _NOT_TRAINED])
        if rng.random() < 0.15:
            place = rng.randrange(len(key))
            key = key[:place] + rng.choice(("", "x", ".", "-", "é")) + key[place + 1 :]
        value = rng.choice(VALUES)
        said.append(f"{key}={value!r:.60}")
        section, _, name = key.partition(".")
        if name and isinstance(values.setdefault(section, {}), dict):
            values[section][name] = value
        else:
            values[section] = value
    if rng.random() < 0.1:
        gone = rng.choice(list(values))
        del values[gone]
        said.append(f"no {gone}")
    path = _write(folder, _dumped(values))
    return Case([verb, str(path)], f"{verb} {', '.join(said)}", folder, has_secret=True)


def _task(rng: random.Random, folder: Path, run: Path) -> Case:
    """A method of the task, or of its data, that does something else."""
    method, behaviour = rng.choice(METHODS), rng.choice(BEHAVIOURS)
    lines = TASK.splitlines()
    number = max(i for i, line in enumerate(lines) if line.strip().startswith(f"def {method}("))
    if rng.random() < 0.1:  # the wrong arguments
        lines[number] = f"    def {method}(self, *, one, two):"
        behaviour = "other arguments"
    else:
        lines.insert(number + 1, f"        {behaviour}")
    path = _write(folder, _dumped(JOB), "\n".join(lines))
    return Case(["train", str(path)], f"{method}: {behaviour}", folder, has_secret=True)


def _override(rng: random.Random, folder: Path, run: Path) -> Case:
    path = _write(folder, _dumped(JOB))
    chosen = rng.sample(OVERRIDES, rng.choice((1, 1, 2)))
    words = [_verb(rng), str(path), "--", *chosen]
    return Case(words, f"{words[0]} {', '.join(c[:60] for c in chosen)}", folder, has_secret=True)


def _text(rng: random.Random, folder: Path, run: Path) -> Case:
    number = rng.randrange(len(TEXTS))
    path = _write(folder, TEXTS[number])
    return Case([_verb(rng), str(path)], f"text {number}: {TEXTS[number][:40]!r}", folder)


def _bytes(rng: random.Random, folder: Path, run: Path) -> Case:
    """A file that is cut, or that holds what no text does."""
    data = bytearray(_dumped(JOB).encode())
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                data[place:place] = rng.choice(
                    (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\t", b"&a *a", b"{")
                )
            case 2:
                del data[place : place + rng.randrange(1, 20)]
            case 3:
                data = data[: place + 1]
    path = _write(folder, bytes(data))
    return Case(["config", str(path)], f"bytes {bytes(data)[:60]!r}", folder)


def _run_id(rng: random.Random, folder: Path, run: Path) -> Case:
    path, name = _write(folder, _dumped(JOB)), rng.choice(RUN_IDS)
    if rng.random() < 0.4:
        verb = rng.choice(("resume", "evaluate"))
        return Case([verb, "--", name], f"{verb} {name[:40]!r}", folder)
    words = ["train", str(path), f"--run-id={name}"]
    return Case(words, f"run id {name[:40]!r}", folder, has_secret=True)


def _damaged_run(rng: random.Random, folder: Path, run: Path) -> Case:
    """A run of which a file is not what it was, with digests that say that all is well."""
    copy = folder / "runs" / run.name
    shutil.copytree(run, copy)
    checkpoint = max((copy / "checkpoints").iterdir())
    part = rng.choice(FILES_OF_A_RUN)
    path = {
        "manifest": checkpoint / "manifest.json",
        "state": checkpoint / "state.json",
        "tensors": checkpoint / "tensors-0.safetensors",
    }.get(part, copy / part)
    data = path.read_bytes()
    content = rng.choice(
        (
            *(
                b"",
                b"{}",
                b"[]",
                b"null",
                b"7",
                b'"x"',
                b"\xff\xfe\0",
                b"[" * 5000,
                data[: len(data) // 2],
            ),
            *(data[::-1], data.replace(b"1", b"9"), data.replace(b"model", b"m0del"), data + b"\0"),
            data.replace(b"tensors-0", b"../../x"),
        )
    )
    path.write_bytes(content)
    if part in ("state", "tensors"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][path.name] = {"size": len(content), "sha256": digest}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    verb = rng.choice((["resume", str(copy), "steps=3"], ["evaluate", str(copy)]))
    secret = f"task_args.dsn=postgres://me:{SECRET}@host/base"
    return Case([*verb, secret], f"{verb[0]} {part}={content[:20]!r}", folder, has_secret=True)
