"""A user's own modules, which a pickled model cannot do without."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from torch import nn

_INSTALLED = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")
)


def own_code(model: nn.Module) -> list[str]:
    """Files and package folders that hold the classes of a model and of its parts, and the modules beside
    them that are loaded, as far as nothing installs them."""
    found = set()
    for name in {type(module).__module__ for module in model.modules()}:
        file = _source(name)
        if file is None:
            continue
        found.add(file)
        for other in list(sys.modules):
            beside = _source(other)
            if beside is not None and beside.parent == file.parent:
                found.add(beside)
    return sorted(str(path) for path in found)


def _source(module: str) -> Path | None:
    """The file of a top-level module, or the folder of its package; None if it is installed."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if top in ("hfdist", "__main__") or file is None:
        return None
    path = Path(file).resolve()
    if path.suffix != ".py" or any(path.is_relative_to(folder) for folder in _INSTALLED):
        return None
    return path.parent if path.name == "__init__.py" else path
