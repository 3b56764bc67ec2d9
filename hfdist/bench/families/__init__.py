"""Tiny models of many families, to check products on; what is not installed is left out."""

from __future__ import annotations

from importlib.util import find_spec

from hfdist.bench.families.family import Family

__all__ = ["Family", "families"]


def families() -> list[Family]:
    """All families whose libraries are installed."""
    from hfdist.bench.families import hugging_face, plain, vision

    every = [*plain.families(), *vision.families(), *hugging_face.families()]
    installed = {source: find_spec(source) is not None for source in {f.source for f in every}}
    return [f for f in every if installed[f.source]]
