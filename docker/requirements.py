"""Requirements of an image: what pyproject.toml asks for, without hfdist itself, and other torches."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

TORCH = ("torch", "torchvision")


def main() -> None:
    """Write torch.txt, requirements.txt and pins.txt into the working folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--extras", default="", help="extras of pyproject.toml, separated by commas"
    )
    for name in TORCH:
        parser.add_argument(f"--{name}", default="", help="version, if not that of constraints.txt")
    arguments = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in filter(None, arguments.extras.split(",")):
        wanted += project["optional-dependencies"][extra]
    pins = Path("constraints.txt").read_text()
    for name in TORCH:
        if version := getattr(arguments, name):
            pins = re.sub(rf"^{name}==.*$", f"{name}=={version}", pins, flags=re.MULTILINE)
    Path("requirements.txt").write_text("\n".join(wanted) + "\n")
    Path("pins.txt").write_text(pins)
    torch = [line for line in pins.splitlines() if line.split("==")[0] in TORCH]
    Path("torch.txt").write_text("\n".join(torch) + "\n")


if __name__ == "__main__":
    main()
