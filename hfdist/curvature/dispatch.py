"""Watching operations below autograd."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """A dispatch mode that leaves torch's compiler alone.

    By default torch wraps the handlers of a mode so that compiled code does not compile them; that imports
    the compiler, which takes two seconds, into every process. No compiled code runs under our modes (see
    `FixedRandomness.evaluation`).
    """

    supports_higher_order_operators = True  # torch.cond and the like come to the handler, too

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
