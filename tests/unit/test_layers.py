"""What the import contracts cannot say: torch.distributed has one home, and nothing prints by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hfdist

ROOT = Path(hfdist.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def names(path: Path) -> set[str]:
    """Modules that a file imports, and dotted names that it uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_distributed_has_one_home(path: Path) -> None:
    if path.is_relative_to(ROOT / "comm"):
        return
    used = {name for name in names(path) if name.startswith("torch.distributed")}
    assert not used, f"use hfdist.comm instead of {used}"


@pytest.mark.parametrize(
    "path",
    [
        p
        for folder in ("optim", "curvature", "comm", "checkpoint")
        for p in (ROOT / folder).rglob("*.py")
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_mathematics_and_edges_print_nothing(path: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls
