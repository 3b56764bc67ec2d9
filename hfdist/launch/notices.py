"""Notices of a run's end, failure and stalls, for an address or a command of the user's."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import os
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdist.errors import UserError, first_line
from hfdist.rundir.files import METRICS
from hfdist.rundir.locations import home_of

if TYPE_CHECKING:
    from hfdist.config.job import RunConfig

logger = logging.getLogger(__name__)

URL_VARIABLE = "HFDIST_NOTIFY_URL"
_TRIES = 3
_PAUSE = 1.0  # seconds between them
_LOOK_EVERY = 5.0  # seconds between looks for a new step, at most
_EVENTS = {"FINISHED": "finished", "KILLED": "stopped"}


@contextmanager
def notices(config: RunConfig, run_dir: Path) -> Iterator[dict[str, Any]]:
    """Tell of the run inside the block: of its end and of stalls while it goes on. The block puts the run's
    result into the dictionary that it gets. Nothing here fails a run."""
    notifier = Notifier(config, run_dir)
    result: dict[str, Any] = {}
    watch = _Watch(notifier, config.notify.stall_seconds)
    try:
        yield result
    except BaseException as error:
        watch.stop()
        is_stop = isinstance(error, (KeyboardInterrupt, SystemExit))
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if is_stop:
            notifier.tell("stopped", "it was stopped before it had a result", status="KILLED")
        else:
            text = f"it failed: {first_line(error) if not words.strip() else words}"
            notifier.tell("failed", text, status="FAILED", error=words)
        raise
    watch.stop()
    status = str(result.get("status"))
    text = f"{status} after {result.get('steps')} steps"
    if result.get("final_loss") is not None:
        text += f", loss {result['final_loss']:.6g}"
    notifier.tell(_EVENTS.get(status, "failed"), text, status=status, result=result)


class Notifier:
    """Delivers notices of one run.

    Args:
        config: The job; its `notify` section says where notices go.
        run_dir: The run's folder.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self._config, self.run_dir = config.notify, run_dir
        self._url = config.notify.url or os.environ.get(URL_VARIABLE)
        self._about = {
            "run_id": run_dir.name,
            "name": config.name,
            "run_dir": home_of(config.output, run_dir),
        }

    def tell(self, event: str, text: str, **more: Any) -> None:
        """Deliver a notice; a failure to do so is a warning."""
        text = f"hfdist run {self._about['run_id']}: {text}"
        notice = _plain({"event": event, "text": text, **self._about, **more})
        for where, deliver in (("url", self._post), ("command", self._call)):
            try:
                deliver(notice)
            except Exception as error:
                # Not the address itself: it may be a secret.
                reason = str(getattr(error, "reason", None) or error or type(error).__name__)
                logger.warning("notify.%s does not take the notice %r: %s", where, event, reason)

    def _post(self, notice: Mapping[str, Any]) -> None:
        if not self._url:
            return
        parsed = urllib.parse.urlsplit(self._url)
        headers = {"Content-Type": "application/json", "User-Agent": "hfdist"}
        if parsed.username:
            pair = f"{urllib.parse.unquote(parsed.username)}:{urllib.parse.unquote(parsed.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        address = parsed._replace(netloc=parsed.netloc.rpartition("@")[2]).geturl()
        request = urllib.request.Request(address, json.dumps(notice).encode(), headers)
        for left in reversed(range(_TRIES)):
            try:
                urllib.request.urlopen(request, timeout=self._config.timeout_seconds).close()
                return
            except OSError:
                if not left:
                    raise
                time.sleep(_PAUSE)

    def _call(self, notice: Mapping[str, Any]) -> None:
        if not self._config.command:
            return
        shown = ("event", "text", "run_id", "run_dir", "status")
        variables = {f"HFDIST_{key.upper()}": str(notice[key]) for key in shown if key in notice}
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._config.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **variables},
            start_new_session=True,  # Ctrl-C is for the run
        )
        try:
            _, said = process.communicate(json.dumps(notice).encode(), self._config.timeout_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)
            process.communicate()
            raise TimeoutError(
                f"it took longer than notify.timeout_seconds={self._config.timeout_seconds:g}"
            ) from None
        if process.returncode:
            words = said.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"exit code {process.returncode}{': ' + words[-1] if words else ''}")


class _Watch:
    """Looks, in the background, whether steps are finished: the record grows with each."""

    def __init__(self, notifier: Notifier, patience: float | None) -> None:
        self._notifier, self._over = notifier, threading.Event()
        if patience is not None:
            run = threading.Thread(
                target=self._run, args=(patience,), name="hfdist-stall", daemon=True
            )
            run.start()

    def stop(self) -> None:
        self._over.set()

    def _run(self, patience: float) -> None:
        seen, since, told = self._look(), time.monotonic(), False
        while not self._over.wait(min(_LOOK_EVERY, patience / 4)):
            now = self._look()
            if now != seen:
                seen, since, told = now, time.monotonic(), False
            elif not told and time.monotonic() - since > patience:
                told = True
                text = f"it has finished no step for {patience:g} s"
                logger.warning("%s (notify.stall_seconds)", text)
                self._notifier.tell("stalled", text, status="RUNNING")

    def _look(self) -> tuple[int, int]:
        try:
            stat = (self._notifier.run_dir / METRICS).stat()
        except OSError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
