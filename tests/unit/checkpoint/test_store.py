"""Checkpoints in a folder and in an object store: all or nothing, verified, kept by rule."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor

from hfdist.checkpoint import CheckpointConfig, CheckpointStore, check, parameters_sha256
from hfdist.comm import Communicator, SerialCommunicator
from hfdist.errors import CheckpointError, StorageError

STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"damping": 0.5, "x0": None, "step": 4, "ratio": math.nan},
    "list": [1, "two", True, {"deep": torch.ones(2, dtype=torch.float64)}],
}


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"memory://{uuid.uuid4().hex}/run"


def store(place: str | Path, comm: Communicator | None = None, **config: Any) -> CheckpointStore:
    return CheckpointStore(place, CheckpointConfig(**config), comm or SerialCommunicator())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_comes_back(place: str, asynchronous: bool) -> None:
    written = store(place, asynchronous=asynchronous)
    written.save(4, STATE, 1.0)
    written.wait()
    step, loaded = store(place).load()
    assert step == 4
    assert same(loaded, STATE)


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text(max_size=6), values, max_size=4))
def test_any_state_comes_back(state: dict[str, Any]) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    written = store(place)
    written.save(0, state, None)
    assert same(written.load()[1], state)


def test_what_is_saved_is_the_moment_of_the_call(place: str) -> None:
    weight = torch.zeros(1000)
    written = store(place)
    written.save(1, {"weight": weight}, None)
    weight.fill_(7.0)  # training goes on while the file is written
    assert not written.load()[1]["weight"].any()


def test_last_and_best_are_kept(place: str) -> None:
    written = store(place, keep=2)
    for step, metric in enumerate([3.0, 1.0, 2.0, None, 5.0]):
        written.save(step, STATE, metric)
    written.wait()
    assert store(place).steps() == [1, 3, 4]
    assert store(place).load("best")[0] == 1
    assert store(place).load(3)[0] == 3


def test_a_step_that_is_written_again_replaces_the_old(place: str) -> None:
    written = store(place)
    written.save(2, {"value": 1}, None)
    written.save(2, {"value": 2}, None)
    written.wait()
    assert store(place).steps() == [2]
    assert store(place).load()[1] == {"value": 2}


def test_asking_for_what_is_not_there_says_what_is(place: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store(place).load()
    written = store(place)
    written.save(2, STATE, None)
    with pytest.raises(CheckpointError, match=r"step 9 .*steps there: 2"):
        written.load(9)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damage_is_found_and_the_one_before_is_taken(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = store(tmp_path)
    written.save(1, STATE, None)
    written.save(2, STATE, None)
    written.wait()
    newest = sorted(tmp_path.iterdir())[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "tensors-0.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage in ("cut", "manifest") else data)
    if damage == "remove":
        file.unlink()
    assert store(tmp_path).load()[0] == 1
    assert f"{newest.name} is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="whole"):
        store(tmp_path).load(2)


def test_leftovers_of_a_killed_writer_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    torn = tmp_path / "000001-step-00000001"
    torn.mkdir()
    (torn / "tensors-0.safetensors").write_bytes(b"half")
    assert store(tmp_path).steps() == []
    written = store(tmp_path)
    written.save(2, STATE, None)
    written.wait()
    assert not torn.exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match=str(file)):
        store(file / "checkpoints", asynchronous=False).save(1, STATE, None)


def test_no_code_is_executed_on_load(tmp_path: Path) -> None:
    written = store(tmp_path)
    written.save(1, STATE, None)
    written.wait()
    names = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {".json", ".safetensors"}
    with pytest.raises(TypeError, match="function"):
        written.save(2, {"bad": lambda: None}, None)


@pytest.mark.timeout(600)
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from hfdist.checkpoint import *; from hfdist.comm import SerialCommunicator\n"
        "s = CheckpointStore(sys.argv[1], CheckpointConfig(keep=2), SerialCommunicator())\n"
        "for k in range(1, 100000):\n"
        "    s.save(k, {'step': k, 'w': torch.full((200_000,), float(k))}, None); print(k, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.037)
    process.kill()
    process.communicate()
    step, state = store(tmp_path).load()
    assert step >= 3
    assert state["step"] == step
    assert (state["w"] == step).all()


# -- ranks


def write(comm: Communicator, place: str) -> None:
    written = store(place, comm)
    state = {"model": {f"p{k}": torch.full((k + 1,), float(k)) for k in range(5)}}
    written.save(3, state, 0.5)
    written.save(4, state, 0.25)
    written.wait()


def read(comm: Communicator, place: str) -> tuple[int, list[float]]:
    step, state = store(place, comm).load()
    return step, [float(t.sum()) for t in state["model"].values()]


@pytest.mark.ranks
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3)])
def test_ranks_share_the_writing_and_any_number_reads(
    writers: int, readers: int, tmp_path: Path
) -> None:
    on_ranks(writers, write, str(tmp_path))
    newest = sorted(tmp_path.iterdir())[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert len([n for n in manifest["files"] if n.startswith("tensors-")]) == writers
    expected = (4, [k * (k + 1.0) for k in range(5)])
    assert on_ranks(readers, read, str(tmp_path)) == [expected] * readers


# -- identity


def test_another_model_is_told_by_its_first_difference() -> None:
    saved = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    check(saved, {"a": torch.ones(2, 3), "b": torch.zeros(1)})
    for other, words in (
        ({"a": torch.zeros(3, 2), "b": torch.zeros(1)}, r"'a' has shape \[2, 3\].*\[3, 2\]"),
        ({"a": torch.zeros(2, 3)}, "'b'"),
        ({**saved, "c": torch.zeros(1)}, "'c'"),
        ({"a": torch.zeros(2, 3).double(), "b": torch.zeros(1)}, "float32 .*float64"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check(saved, other)


def test_digest_sees_every_bit_and_nothing_else() -> None:
    a = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    assert parameters_sha256(a) == parameters_sha256(dict(reversed(a.items())))
    strided = {"w": a["w"].T.contiguous().T, "b": a["b"]}
    assert parameters_sha256(strided) == parameters_sha256(a)
    changed = {"w": a["w"].clone(), "b": a["b"]}
    changed["w"][1, 2] = torch.nextafter(changed["w"][1, 2], torch.tensor(9.0))
    assert parameters_sha256(changed) != parameters_sha256(a)
    assert parameters_sha256({"w": a["w"].double(), "b": a["b"]}) != parameters_sha256(a)


# -- checkpoints by somebody else


def rewritten(folder: Path, name: str, content: bytes, under: str | None = None) -> None:
    """Replace a file of the newest checkpoint, with a manifest that says that it is whole."""
    checkpoint = max(path for path in folder.iterdir() if path.is_dir())
    (checkpoint / (under or name)).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"].pop(name, None)
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][under or name] = {"size": len(content), "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("tensors-0.safetensors", bad)
            for bad in (b"", b"x" * 99, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}")
        ),
        *(
            ("state.json", bad)
            for bad in (b"", b"[]", b"7", b"{", b"\xff", b'{"$tensor": "none"}', b"[" * 9999)
        ),
    ],
)
def test_a_digest_that_fits_makes_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    written = store(tmp_path, asynchronous=False)
    written.save(1, STATE, 1.0)
    written.save(2, STATE, 0.5)
    rewritten(tmp_path, name, content)
    assert store(tmp_path).load()[0] == 1
    assert "is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="is whole"):
        store(tmp_path).load(2)


@pytest.mark.parametrize(
    "name", ["../x", "../../x", "/x", "a/b", "..", "", "tensors-0.safetensors/../x"]
)
def test_names_of_a_manifest_stay_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run" / "checkpoints"
    written = store(folder, asynchronous=False)
    written.save(1, STATE, 1.0)
    target = next(path for path in folder.iterdir() if path.is_dir())
    manifest = json.loads((target / "manifest.json").read_text())
    secret = tmp_path / "run" / "x"
    secret.write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    manifest["files"][name] = {"size": 4, "sha256": digest}
    (target / "manifest.json").write_text(json.dumps(manifest))
    reading = store(folder, asynchronous=False, keep=1)
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        reading.load()
    reading.save(2, STATE, 0.1)  # and what it names is left alone when the checkpoint goes
    reading.wait()
    assert secret.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "7", "null", '{"format": "x"}', '{"files": 1, "format": 1}', "{"]
)
def test_a_manifest_that_is_none_is_told(tmp_path: Path, manifest: str) -> None:
    written = store(tmp_path, asynchronous=False)
    written.save(1, STATE, 1.0)
    (max(p for p in tmp_path.iterdir() if p.is_dir()) / "manifest.json").write_text(manifest)
    for which in (None, "best", 1):
        with pytest.raises(CheckpointError):
            store(tmp_path).load(which)
    store(tmp_path, asynchronous=False).save(2, STATE, 0.5)
    assert store(tmp_path).load("best")[0] == 2
