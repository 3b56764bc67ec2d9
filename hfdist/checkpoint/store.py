"""The checkpoints of a run: written by all ranks, kept by rule, verified when read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from hfdist.checkpoint.encoding import Encoder, decode, shares, to_host
from hfdist.checkpoint.storage import Storage, open_storage
from hfdist.comm import Communicator
from hfdist.config.checkpoint import CheckpointConfig
from hfdist.errors import CheckpointError, StorageError, first_line

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"(\d{6})-step-(\d{8})")
_FILE = re.compile(r"state\.json|tensors-\d+\.safetensors")
_WAIT_FOR_RANKS = 120.0  # seconds that rank 0 waits for the others' parts


class CheckpointStore:
    """Checkpoints under a folder or an address.

    A save copies the state to host memory and returns; a thread of each rank writes that rank's share of
    the tensors, and rank 0's then writes the manifest that makes the checkpoint visible. The threads
    meet in the storage, not in collectives, which belong to the training.

    Args:
        folder: A path, or an address such as s3://bucket/run/checkpoints.
        config: What is kept.
        comm: The ranks; `save`, `load` and `wait` are collective.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig, comm: Communicator) -> None:
        self._folder, self._config, self._comm = str(folder), config, comm
        self._storage = open_storage(folder)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hfdist-checkpoint")
        self._writing: Future[None] | None = None
        self._is_clean = False

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending. Not collective."""
        return sorted({_parse(name)[1] for name in _visible(self._storage)})

    # -- write -----------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any], metric: float | None) -> None:
        """Write a checkpoint, and remove those that need not be kept.

        Args:
            step: Number of finished steps.
            state: Nested dicts and lists of tensors, numbers, strings and None; equal on all ranks.
            metric: What `best` compares, lower is better; None if unknown.

        Raises:
            StorageError: This save, or the one before, could not be written; older checkpoints are intact.
        """
        self.wait()
        folder = self._comm.broadcast_object(self._begin(step) if self._comm.is_rank_0 else "")
        if folder.startswith("!"):
            raise StorageError(folder[1:])
        encoder = Encoder()
        document = encoder.encode(dict(state))
        mine = shares(encoder.tensors, self._comm.world_size)[self._comm.rank]
        snapshot = {name: to_host(encoder.tensors[name]) for name in mine}
        self._writing = self._pool.submit(
            self._write, folder, step, metric, document if self._comm.is_rank_0 else None, snapshot
        )
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return once what was saved is there.

        Raises:
            StorageError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:  # the same on all ranks
            return
        error = writing.exception()
        message = None if error is None else self._explain(error)
        for problem in self._comm.all_gather_object(message):
            if problem is not None:
                raise StorageError(problem) from error

    def _begin(self, step: int) -> str:
        """A new checkpoint's name; or "!" and what is wrong, for all ranks to raise."""
        try:
            folders = self._storage.folders()
            if not self._is_clean:
                # What a killed writer left: folders without a manifest.
                for name in folders:
                    if _NAME.fullmatch(name) and MANIFEST not in self._storage.files(name):
                        self._storage.remove_folder(name)
                self._is_clean = True
            numbers = [_parse(name)[0] for name in folders if _NAME.fullmatch(name)]
            return f"{max(numbers, default=0) + 1:06d}-step-{step:08d}"
        except Exception as error:
            return "!" + self._explain(error)

    def _write(
        self,
        folder: str,
        step: int,
        metric: float | None,
        document: Any,
        snapshot: dict[str, Tensor],
    ) -> None:
        rank, world_size = self._comm.rank, self._comm.world_size
        try:
            part = safetensors.torch.save(snapshot)
            self._put(folder, f"tensors-{rank}.safetensors", part)
            if document is None:
                return
            self._put(folder, STATE, json.dumps(document).encode())
            files = [STATE, *(f"tensors-{r}.safetensors" for r in range(world_size))]
            entries = self._entries_of_all(folder, files)
            manifest = {
                "format": FORMAT,
                "step": step,
                "metric": metric,
                "world_size": world_size,
                "files": entries,
            }
            self._storage.write(folder, MANIFEST, json.dumps(manifest, indent=1).encode())
            for name in entries:
                self._storage.remove_file(folder, _seal(name))
            self._prune()
        except BaseException:
            if document is not None:
                self._storage.remove_folder(folder)
            raise

    def _put(self, folder: str, name: str, data: bytes) -> None:
        """A file, then its size and digest, by which rank 0 sees that it is complete."""
        self._storage.write(folder, name, data)
        seal = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._storage.write(folder, _seal(name), json.dumps(seal).encode())

    def _entries_of_all(self, folder: str, files: list[str]) -> dict[str, Any]:
        deadline = time.monotonic() + _WAIT_FOR_RANKS
        pause = 0.01
        while True:
            present = self._storage.files(folder)
            missing = [name for name in files if _seal(name) not in present]
            if not missing:
                return {n: json.loads(self._storage.read(folder, _seal(n))) for n in files}
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{missing[0]} of {folder} did not arrive: does every worker write to the same "
                    "shared `output`?"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _prune(self) -> None:
        """Keep the newest, and the best; of a step that was written again, the later one."""
        names = _visible(self._storage)
        by_step = {_parse(name)[1]: name for name in names}  # the later one wins
        keep = set(sorted(by_step.values())[-self._config.keep :])
        if self._config.best:
            best = self._best(sorted(by_step.values()))
            keep |= {best} if best else set()
        for name in names:
            if name not in keep:
                self._storage.remove_file(name, MANIFEST)  # from here on nobody sees it
                self._storage.remove_folder(name)
        # What a killed run began before the newest one, and never finished.
        for name in self._storage.folders():
            if _NAME.fullmatch(name) and name < names[-1] and name not in names:
                self._storage.remove_folder(name)

    def _best(self, names: list[str]) -> str | None:
        known = {name: m for name in names if (m := self._metric(name)) is not None and m == m}
        return min(known, key=lambda name: (known[name], name)) if known else None

    def _metric(self, name: str) -> float | None:
        try:
            return float(self._manifest(name)["metric"])
        except (ValueError, KeyError, TypeError):  # none; or a damaged manifest, which is no best
            return None

    # -- read ------------------------------------------------------------------------------------

    def load(self, which: int | Literal["best"] | None = None) -> tuple[int, dict[str, Any]]:
        """Read a checkpoint: verified, and if it is damaged the one before it, with a warning.

        Args:
            which: A step, "best", or None for the newest.

        Returns:
            The step and the state, tensors on the host.

        Raises:
            CheckpointError: There is none, or none that is whole.
        """
        self.wait()
        chosen = self._comm.broadcast_object(self._choose(which) if self._comm.is_rank_0 else "")
        if chosen.startswith("!"):
            raise CheckpointError(chosen[1:])
        return self._read(chosen)

    def _read(self, name: str) -> tuple[int, dict[str, Any]]:
        """The step and the state of a checkpoint; raises whatever is wrong with it."""
        manifest = self._manifest(name)
        tensors: dict[str, Tensor] = {}
        for file in manifest["files"]:
            if file != STATE:
                tensors |= safetensors.torch.load(self._storage.read(name, file))
        state = decode(json.loads(self._storage.read(name, STATE)), tensors.__getitem__)
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no state")
        return int(manifest["step"]), state

    def _choose(self, which: int | Literal["best"] | None) -> str:
        try:
            names = _visible(self._storage)
            if which == "best":
                best = self._best(names)
                candidates = [*names, *([best] if best else [])]
            elif which is not None:
                candidates = [name for name in names if _parse(name)[1] == which]
            else:
                candidates = names
            if not candidates:
                there = ", ".join(map(str, self.steps())) or "none"
                asked = "no checkpoint" if which is None else f"no checkpoint of step {which}"
                return f"!{asked} in {self._folder} (steps there: {there})"
            problem = ""
            for name in reversed(candidates):
                problem = self._damage(name)
                if not problem:
                    return name
                if which is not None and which != "best":
                    break
                logger.warning(
                    "checkpoint %s is damaged (%s): taking the one before", name, problem
                )
            return f"!no checkpoint in {self._folder} is whole ({problem}): start a new run"
        except OSError as error:
            return "!" + self._explain(error)

    def _damage(self, name: str) -> str:
        """What is wrong with a checkpoint; "" if nothing is."""
        try:
            manifest = self._manifest(name)
            if manifest["format"] > FORMAT:
                return f"format {manifest['format']} is newer than this program"
            for file, entry in manifest["files"].items():
                # Whoever wrote the manifest says which files are read: none outside of the folder.
                if not _FILE.fullmatch(file):
                    return f"its manifest names {file!r}, which is no file of a checkpoint"
                data = self._storage.read(name, file)
                if len(data) != entry["size"]:
                    return f"{file} has {len(data)} bytes instead of {entry['size']}"
                if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                    return f"{file} does not have the SHA-256 of its manifest"
            self._read(name)  # a digest says that a file is whole, not that it is one of ours
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return ""

    def _manifest(self, name: str) -> dict[str, Any]:
        return json.loads(self._storage.read(name, MANIFEST))

    def _explain(self, error: BaseException) -> str:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return (
            f"checkpoints in {self._folder} cannot be written or read: {reason}. Free some space or "
            "fix the permissions; older checkpoints are intact"
        )


def _visible(storage: Storage) -> list[str]:
    """Names of the checkpoints that are there, in the order of their writing."""
    return [
        name
        for name in storage.folders()
        if _NAME.fullmatch(name) and MANIFEST in storage.files(name)
    ]


def _parse(name: str) -> tuple[int, int]:
    """(number, step)."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1]), int(match[2])


def _seal(name: str) -> str:
    return f"{name}.seal"
