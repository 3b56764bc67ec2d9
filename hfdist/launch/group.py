"""A group of worker processes on this machine: started, watched, and ended together.

Not torch's `elastic_launch`: it ends everybody at the first error, which may be that of a worker that only
missed a stalled one, and it does not say how each worker stood.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hfdist.errors import ConfigError, UserError
from hfdist.launch.child import Assignment, Failed, Finished, Joined
from hfdist.launch.failures import Ended, record_cause, root_cause
from hfdist.launch.logs import path_of
from hfdist.rundir.stop import signals_handled_by

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig

logger = logging.getLogger(__name__)

_POLL = 0.1  # seconds between looks at processes that send nothing
_SILENCE = 2.0
"""Seconds after a worker missed a peer in which others report the same; who has not is the one missed."""
_MOST_A_CORE = 16
_MEMORY_OF_A_WORKER = 256 * 1024**2  # bytes: what Python and torch take before there is a model
_GRACE = 0.8
"""Part of the timeout that rank 0 has after a failure to finish its record of the run."""


def run_group(config: RunConfig, *, run_dir: Path, resume: bool, display: str) -> dict[str, Any]:
    """Run the job on several processes of this machine; restart them after failures as the job allows.

    Raises:
        UserError: Bad input, or a worker that failed, with that worker's own error.
    """
    from hfdist.devices import resolve

    _check_room(config.launch.max_workers)
    resolve(config.device, 0, config.launch.max_workers)  # too few GPUs: say so at once
    failures = 0
    while True:
        try:
            return Group(config, run_dir, resume, display).run()
        except UserError as error:
            # exit code 2: a mistake in job, task or data, which another try would repeat
            if error.exit_code == 2 or failures >= config.launch.max_failures:
                raise
            failures += 1
            logger.warning(
                "%s. Restarting all workers from the newest checkpoint (failure %d of %d allowed)",
                error,
                failures,
                config.launch.max_failures,
            )
            resume = True


class Member:
    """One worker process as its parent sees it."""

    def __init__(self, assignment: Assignment) -> None:
        self.rank = assignment.rank
        self.joined = False
        self.answer: Finished | Failed | None = None
        self.ended_at = 0.0
        self.connection, theirs = Pipe(duplex=True)
        log = path_of(assignment.run_dir, self.rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file, contextlib.closing(theirs):
            # Rank 0 has the terminal. A group of its own keeps the terminal's Ctrl-C from reaching
            # a worker beside the one that its parent hands on.
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "hfdist.launch.child"),
                    *(str(theirs.fileno()), str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=None if self.rank == 0 else file,
                stderr=None if self.rank == 0 else file,
                pass_fds=(theirs.fileno(),),
                env=_environment(assignment.threads),
                process_group=0,
            )
        with contextlib.suppress(OSError):  # it has died already: seen when it is looked at
            self.connection.send(assignment)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def receive(self) -> None:
        """Take what the worker has sent."""
        try:
            while not self.connection.closed and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, Joined):
                    self.joined = True
                else:
                    self.answer, self.ended_at = message, time.monotonic()
        except (EOFError, OSError):
            self.connection.close()
        if self.has_ended and not self.ended_at:
            self.ended_at = time.monotonic()

    def send_signal(self, number: int) -> None:
        """Hand a signal on."""
        if not self.has_ended:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if not self.has_ended:
            self.process.kill()  # ends stopped processes, too

    def ended(self) -> Ended:
        """The state of the worker."""
        return Ended(
            rank=self.rank,
            answer=self.answer,
            at=self.ended_at,
            exit_code=self.process.poll(),
            is_stopped=not self.has_ended and _is_stopped(self.process.pid),
        )


class Group:
    """One attempt of a group of workers.

    Args:
        config: The job.
        run_dir: The run's folder.
        resume: Go on from the newest checkpoint.
        display: Name of rank 0's display.
    """

    def __init__(self, config: RunConfig, run_dir: Path, resume: bool, display: str) -> None:
        self._config, self._run_dir = config, run_dir
        self._resume, self._display = resume, display
        self._timeout = config.launch.timeout_seconds
        self._signals = 0
        self._members: list[Member] = []

    def run(self) -> dict[str, Any]:
        """Start the workers and stay until all have ended.

        Returns:
            Rank 0's result.

        Raises:
            UserError: The error of the worker that failed first.
            KeyboardInterrupt: A signal before training began.
        """
        folder = Path(tempfile.mkdtemp(prefix="hfdist-"))
        try:
            with self._handing_signals_on():
                self._start(folder)
                endings = self._watch()
        finally:
            self._end_all()
            shutil.rmtree(folder, ignore_errors=True)
        cause = root_cause(endings, self._run_dir, self._timeout)
        answer = self._members[0].answer
        if cause is None and isinstance(answer, Finished):
            return answer.result
        if self._signals or not isinstance(cause, UserError):
            raise KeyboardInterrupt
        record_cause(self._run_dir, cause)
        raise cause

    def _start(self, folder: Path) -> None:
        world_size = self._config.launch.max_workers
        threads = self._config.launch.threads_per_worker or max(1, _cores() // world_size)
        for rank in range(world_size):
            assignment = Assignment(
                rank=rank,
                world_size=world_size,
                threads=threads,
                # A file needs no free port, and nobody else can meet here.
                init_method=f"file://{folder}/rendezvous",
                config=self._config,
                run_dir=self._run_dir,
                resume=self._resume,
                display=self._display,
            )
            self._members.append(Member(assignment))

    def _watch(self) -> list[Ended]:
        """Wait until all workers have ended, or those left over are not worth waiting for.

        Returns:
            The state of each worker then.
        """
        failed_at = finished_at = float("inf")
        while True:
            running = [member for member in self._members if not member.has_ended]
            for member in self._members:  # after the look above: who has ended has sent everything
                member.receive()
            endings = [member.ended() for member in self._members]
            if not running:
                return endings
            now = time.monotonic()
            if any(ending.has_failed for ending in endings):
                failed_at = min(failed_at, now)
                if self._is_over(endings, now - failed_at):
                    return endings
            elif isinstance(self._members[0].answer, Finished):
                finished_at = min(finished_at, now)
                if now - finished_at > self._timeout:
                    logger.warning("%d workers do not end: killed", len(running))
                    return endings
            open_ones = [m.connection for m in running if not m.connection.closed]
            if open_ones:
                wait(open_ones, timeout=_POLL)
            else:
                time.sleep(_POLL)

    def _is_over(self, endings: list[Ended], seconds: float) -> bool:
        """Whether nothing worth waiting for can still come, `seconds` after the first failure."""
        grace = _GRACE * self._timeout
        if seconds > grace:
            return True
        if all(ending.misses_peer for ending in endings if ending.has_failed):
            # Who failed first is not known yet: it stalls, or its end is about to be seen.
            return seconds > min(_SILENCE, grace) and self._rank_0_is_done(endings)
        return self._rank_0_is_done(endings)

    def _rank_0_is_done(self, endings: list[Ended]) -> bool:
        """Whether rank 0 has recorded how the run ended, cannot, or has nothing to record."""
        first = endings[0]
        has_ended = first.answer is not None or first.exit_code is not None
        return has_ended or first.is_stopped or not self._members[0].joined

    def _end_all(self) -> None:
        rank_0_was_killed = bool(self._members) and not self._members[0].has_ended
        for member in self._members:
            member.kill()
        for member in self._members:
            member.process.wait()
            member.connection.close()
        if rank_0_was_killed and sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a killed display cannot show the cursor again

    @contextmanager
    def _handing_signals_on(self) -> Iterator[None]:
        """Hand every SIGINT and SIGTERM on to all workers, once each; a third ends them at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals > 2:
                raise KeyboardInterrupt
            for member in self._members:
                member.send_signal(number)

        with signals_handled_by(handle):
            yield


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    # The same modules as here, wherever this program found them.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # gloo takes the address of the host's name, which may be that of another machine.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return environment


def _check_room(workers: int) -> None:
    """Refuse more processes than a machine can serve, before any of them is started.

    Raises:
        ConfigError: There are too many.
    """
    import psutil

    cores, memory = _cores(), psutil.virtual_memory().total
    most = max(2, min(_MOST_A_CORE * cores, memory // _MEMORY_OF_A_WORKER))
    if workers > most:
        raise ConfigError(
            f"launch.workers is {workers}, but this machine has {cores} cores and {memory / 1e9:.0f} GB: at "
            f"most {most} workers here. Lower it, or use several machines (launch.backend=ray, or torchrun)"
        )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_stopped(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
