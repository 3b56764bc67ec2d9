"""Hold everything still that a forward pass moves: random numbers, batch-norm statistics, kernels.

A step compares losses and products at the same objective, so every evaluation of it must see the
same dropout masks, and none may leave a trace in the model's buffers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from hfdist.devices import is_accelerator, seeded

logger = logging.getLogger(__name__)

_Key = tuple[nn.Module, str]


class FixedRandomness:
    """Evaluations that leave no trace.

    Args:
        device: Where the model runs.
        model: The model, if it is known; otherwise the modules that run are found while they run.

    Buffers (batch-norm statistics, counters) are put back after every evaluation. What the recorded
    evaluations moved those of modules in training mode to is averaged by weight and applied once, by
    `moved_buffers` and `apply`.

    Activation checkpointing is switched off: its second forward pass would run when the random numbers,
    kernels and buffers are no longer held, and products keep the activations anyway.
    """

    def __init__(self, device: torch.device, model: nn.Module | None = None) -> None:
        self._device = device
        self._discover = model is None
        self._start: dict[
            _Key, Tensor
        ] = {}  # value at the step's start, of modules in training mode
        self._resting: dict[_Key, Tensor] = {}  # of modules in evaluation mode
        self._objects: dict[_Key, Tensor] = {}  # the buffers themselves
        self._versions: dict[_Key, int] = {}
        self._sum: dict[_Key, Tensor] = {}  # weighted sum of the recorded values, float64
        self._weight: float | Tensor = 0.0
        self._has_rnn = False
        self._wrappers: dict[DistributedDataParallel, tuple[bool, bool]] = {}  # their own settings
        if model is not None:
            self._remember(model)

    @contextmanager
    def evaluation(self, seed: int) -> Iterator[None]:
        """Run a forward pass inside; call `record` there to keep what it moves the buffers to.

        Args:
            seed: Seed of the random numbers drawn inside; the global generators are untouched.
        """
        with ExitStack() as stack:
            stack.enter_context(seeded(self._device, seed))
            if "torch._dynamo" in sys.modules:
                # A compiled model has no second derivatives: everything sees it as it was written.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Only this attention kernel has the second derivatives that products need, and losses
            # must come from the same one.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_without_checkpointing())
            stack.enter_context(_eager_branches())
            if self._discover:
                hook = register_module_forward_pre_hook(lambda module, _: self._remember(module))
                stack.callback(hook.remove)
            for wrapper in self._wrappers:
                self._silence(wrapper)
            if is_accelerator(self._device) and self._has_rnn:
                # cuDNN's recurrent kernels have no second derivatives.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if torch.is_autocast_enabled("cpu") and self._has_rnn:
                # oneDNN's recurrent kernels in bfloat16 exist on some processors only.
                # (torch.backends.mkldnn.flags also sets TF32, and warns of it.)
                stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
                torch._C._set_mkldnn_enabled(False)
            try:
                yield
            finally:
                self._restore()
                for wrapper, settings in self._wrappers.items():
                    wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = (
                        settings
                    )

    def _remember(self, module: nn.Module) -> None:
        if (module, "") in self._start:
            return
        for m in module.modules():
            self._start[(m, "")] = torch.empty(0)  # marks the module as seen
            self._has_rnn |= isinstance(m, nn.RNNBase)
            if isinstance(m, DistributedDataParallel):
                self._wrappers[m] = (m.require_backward_grad_sync, m.require_forward_param_sync)
                self._silence(m)
            for name, buffer in m._buffers.items():
                if buffer is not None:
                    own = self._start if m.training else self._resting
                    own.setdefault((m, name), buffer.detach().clone())
                    self._objects.setdefault((m, name), buffer)
                    self._versions.setdefault((m, name), _version(buffer))

    @staticmethod
    def _silence(wrapper: DistributedDataParallel) -> None:
        """Sums over ranks are ours: the wrapper would wait for a backward() that never comes, and send
        buffers around in every trial evaluation."""
        wrapper.require_backward_grad_sync = False
        wrapper.require_forward_param_sync = False

    def record(self, weight: float | Tensor) -> None:
        """Remember the buffers as they are now, with a weight (the pass's number of examples)."""
        self._weight = self._weight + weight
        for module, name in self._moving():
            value = module._buffers[name].detach().double() * weight  # type: ignore[union-attr]
            key = (module, name)
            self._sum[key] = self._sum[key] + value if key in self._sum else value

    @torch.no_grad()
    def _restore(self) -> None:
        for key, buffer in self._objects.items():
            module, name = key
            replaced = module._buffers.get(name) is not buffer
            if replaced:
                module._buffers[name] = buffer
            if key in self._resting:
                moved = _version(buffer) != self._versions[key]
                if moved or replaced:
                    _warn_of_resting(module, name)
                if not moved:
                    continue
            # .data: no event for autograd, which may have saved the buffer for a backward pass.
            buffer.data.copy_(self._start[key] if key in self._start else self._resting[key])
            self._versions[key] = _version(buffer)

    def _moving(self) -> list[_Key]:
        return [key for key in self._start if key[1]]

    def moved_buffers(self) -> Tensor | None:
        """[B + 1] float64: weighted sums of the recorded buffers, and the weight; None without any.

        Summed over ranks, it is what `apply` takes: the running statistics of a step are the
        example-weighted mean of what each microbatch would have made of them.
        """
        keys = self._moving()
        if not keys:
            return None
        parts = [
            self._sum[key].reshape(-1)
            if key in self._sum
            else torch.zeros_like(self._start[key], dtype=torch.float64).reshape(-1)
            for key in keys
        ]
        weight = torch.zeros(1, dtype=torch.float64, device=parts[0].device) + self._weight
        return torch.cat([*parts, weight])

    @torch.no_grad()
    def apply(self, moved: Tensor) -> None:
        """Set the buffers to the mean that `moved` [B + 1] holds."""
        self.set(self.values(moved))

    @torch.no_grad()
    def values(self, moved: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(buffer, its value in the mean that `moved` [B + 1] holds) of each; none where the weight is 0."""
        values, weight = moved[:-1], moved[-1]
        if not float(weight) > 0:
            return []
        found = []
        keys = self._moving()
        pieces = (values / weight).split([self._start[key].numel() for key in keys])
        for (module, name), piece in zip(keys, pieces):
            buffer = module._buffers[name]
            assert buffer is not None
            value = piece.view(buffer.shape)
            if not buffer.is_floating_point():
                value = value.round()  # a counter: the mean of equal integers
            found.append((buffer, value))
        return found

    @torch.no_grad()
    def set(self, values: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write `values` into the buffers."""
        for buffer, value in values:
            buffer.data.copy_(value)


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """`torch.utils.checkpoint.checkpoint` calls its function as if it were not there."""
    module: Any = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        yield
        return
    ways = {
        "CheckpointFunction": _PlainFunction,
        "_checkpoint_without_reentrant_generator": _plain_generator,
        "_checkpoint_without_reentrant_generator_impl": _plain_generator,
    }
    own = {name: getattr(module, name) for name in ways if hasattr(module, name)}
    for name in own:
        setattr(module, name, ways[name])
    try:
        yield
    finally:
        for name, way in own.items():
            setattr(module, name, way)


@contextmanager
def _eager_branches() -> Iterator[None]:
    """`torch.cond` and `while_loop` run as Python's if and while: torch compiles them, and the compiled ones
    have no second derivatives."""
    module: Any = sys.modules.get("torch._higher_order_ops.utils")
    compiled = getattr(module, "_hop_compile_and_call", None)
    if compiled is None:
        yield
        return

    def call(function: Any, args: tuple[Any, ...], *rest: Any, **kwargs: Any) -> Any:
        kind = getattr(function, "__qualname__", "").partition(".")[0]
        if kind == "cond" and len(args) == 4:
            condition, if_true, if_false, operands = args
            return (if_true if bool(condition) else if_false)(*operands)
        if kind == "while_loop" and len(args) == 4:
            condition, body, carried, others = args
            while bool(condition(*carried, *others)):
                carried = tuple(body(*carried, *others))
            return carried
        return compiled(function, args, *rest, **kwargs)

    module._hop_compile_and_call = call
    try:
        yield
    finally:
        module._hop_compile_and_call = compiled


class _PlainFunction:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain_generator(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _warn_of_resting(module: nn.Module, name: str) -> None:
    key = f"{type(module).__name__}.{name}"
    if key not in _warned:
        _warned.add(key)
        logger.warning(
            "buffer %s moves in evaluation mode: it is put back after every evaluation, so that a step "
            "sees one function; train() keeps what it moves to",
            key,
        )


_warned: set[str] = set()
