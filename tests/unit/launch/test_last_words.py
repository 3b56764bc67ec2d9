"""A process that is ended has a last word; one that ends by itself has none."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from hfdist.launch.last_words import last_words
try:
    with last_words("error: 'gone' $HOME"):
        {end}
except ValueError:
    pass
"""


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os._exit(1)", 1, "error: 'gone' $HOME\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "error: 'gone' $HOME\n"),
        ("pass", 0, ""),
        ("raise ValueError", 0, ""),
    ],
)
def test_only_a_process_that_is_ended_speaks(end: str, code: int, words: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=240
    )
    assert (ended.returncode, ended.stderr) == (code, words)
