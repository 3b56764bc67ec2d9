"""The README's map and its walks through the code, held against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAP = README.partition("## The map")[2].partition("###")[0]
WALKS = README.partition("### Three walks")[2]
STEPS = re.findall(r"`([\w/]+\.py):([\w.]+)`", WALKS)


def entries() -> dict[str, str]:
    """{folder or file below the repository's root: its description}, from the map's indentation."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for indent, name, text in re.findall(r"^( +)([\w.]+/?) *(.*)$", MAP, re.MULTILINE):
        above = [(depth, path) for depth, path in above if depth < len(indent)]
        path = (above[-1][1] if above else "") + name
        above.append((len(indent), path))
        found[path] = text
    return found


def definitions(path: Path) -> set[str]:
    """Names of a file's functions and classes, methods as Class.method."""

    def of(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= of(node.body, f"{prefix}{node.name}.")
        return found

    return of(ast.parse(path.read_text()).body, "")


def test_the_map_names_every_folder() -> None:
    packages = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for path in (ROOT / "hfdist").rglob("__init__.py")
    }
    assert packages <= set(entries())


def test_the_map_names_every_module_at_the_top() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hfdist").glob("[a-z]*.py")}
    assert modules <= set(entries())
    assert len(modules) <= 8


def test_the_map_names_what_exists() -> None:
    described = entries()
    assert [path for path in described if not (ROOT / path).exists()] == []
    assert [path for path, text in described.items() if not text and path != "hfdist/"] == []


@pytest.mark.parametrize(("file", "name"), STEPS, ids=lambda value: value)
def test_a_step_of_a_walk_exists(file: str, name: str) -> None:
    assert name in definitions(ROOT / "hfdist" / file)


def test_there_are_three_walks_and_they_end_where_they_say() -> None:
    walks = re.split(r"\n(?=\S.*:\n\n1\. )", WALKS)[1:]
    steps = [re.findall(r"`([\w/]+\.py):([\w.]+)`", walk) for walk in walks]
    assert len(steps) == 3
    ends = [{file.partition("/")[0] for file, _ in (walk[0], walk[-1])} for walk in steps]
    assert ends[0] == {"config", "comm"}
    assert ends[2] == {"optim", "tracking"}
    assert all(len(walk) >= 5 for walk in steps)
