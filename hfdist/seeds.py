"""Independent random seeds from a run's one seed."""

from __future__ import annotations

import hashlib


def mixed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order; the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
