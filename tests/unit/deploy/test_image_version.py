"""Files of deploy/ that name an image name the present version's."""

from __future__ import annotations

import re
from pathlib import Path

import hfdist

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("deploy", "docker", "docs")


def test_images_are_those_of_this_version() -> None:
    named = {
        (path.relative_to(ROOT).as_posix(), version)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".png", ".pyc")
        for version in re.findall(r"\bhfdist(?:-vm)?:(\d[\w.]*\w)", path.read_text(errors="ignore"))
    }
    assert len(named) >= 3
    assert {version for _, version in named} == {hfdist.__version__}, named
