"""Requirements of an image: what pyproject.toml asks for, without hfdist itself, and other torches."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

TORCH = ("torch", "torchvision")


def requirements(project: dict, extras: str) -> list[str]:
    """Dependencies of a project and of some of its extras, separated by commas."""
    wanted, known = list(project["dependencies"]), project.get("optional-dependencies", {})
    for extra in filter(None, (part.strip() for part in extras.split(","))):
        if extra not in known:
            sys.exit(f"EXTRAS: pyproject.toml has no extra {extra!r}, but {', '.join(known)}")
        wanted += known[extra]
    return wanted


def pinned(pins: str, name: str, version: str) -> str:
    """The same pins, but for one version."""
    changed, count = re.subn(rf"^{name}==.*$", f"{name}=={version}", pins, flags=re.MULTILINE)
    if not count:
        sys.exit(f"{name.upper()}_VERSION: constraints.txt has no line {name}==... to change")
    return changed


def main() -> None:
    """Write torch.txt, requirements.txt and pins.txt into the working folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--extras", default="", help="extras of pyproject.toml, separated by commas"
    )
    for name in TORCH:
        parser.add_argument(f"--{name}", default="", help="version, if not that of constraints.txt")
    arguments = parser.parse_args()
    wanted = requirements(
        tomllib.loads(Path("pyproject.toml").read_text())["project"], arguments.extras
    )
    pins = Path("constraints.txt").read_text()
    for name in TORCH:
        if version := getattr(arguments, name):
            pins = pinned(pins, name, version)
    Path("requirements.txt").write_text("\n".join(wanted) + "\n")
    Path("pins.txt").write_text(pins)
    torch = [line for line in pins.splitlines() if line.split("==")[0] in TORCH]
    Path("torch.txt").write_text("\n".join(torch) + "\n")


if __name__ == "__main__":
    main()
