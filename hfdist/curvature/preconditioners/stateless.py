"""Evaluate a model example by example without a trace of it on the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm


class FixedStatistics:
    """Batch statistics of one batch norm in training mode, recorded once and held fixed after.

    In training mode the examples of a batch depend on each other, and no example has a gradient of
    its own. With the statistics held fixed the layer is affine, and the outputs stay the same.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.recording = True
        self.calls = 0
        self._moments: list[tuple[Tensor, Tensor]] = []  # one a call of the layer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.recording:
            x = args[0].detach()
            axes = [axis for axis in range(x.ndim) if axis != 1]
            var, mean = torch.var_mean(x, axes, correction=0)
            self._moments.append((mean, var))
        mean, var = self._moments[self.calls % len(self._moments)]
        self.calls += 1
        module._buffers["running_mean"], module._buffers["running_var"] = mean, var


class UntouchedModel:
    """The model as a pure function of the batch; see `untouched`."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        statistics: list[FixedStatistics],
    ) -> None:
        self.model = model
        self._forward = forward
        self._statistics = statistics

    def record(self, batch: Any) -> Any:
        """Outputs for the whole batch; batch norm's statistics are those of this call from now on."""
        with torch.no_grad():
            outputs = self(self.model, batch)
        for fixed in self._statistics:
            fixed.recording = False
        return outputs

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Outputs for a part of the batch."""
        for fixed in self._statistics:
            fixed.calls = 0
        return self._forward(model, batch)


@contextlib.contextmanager
def untouched(
    model: nn.Module, forward: Callable[[nn.Module, Any], Any]
) -> Iterator[UntouchedModel]:
    """A context in which evaluations of `model` leave its buffers, modes and hooks as they were.

    Buffers are replaced by clones; batch norm in training mode uses the statistics of the batch
    given to `record`; attention and recurrent layers use kernels that torch.func can transform.
    """
    modules = list(model.modules())
    buffers = [dict(m._buffers) for m in modules]
    statistics = []
    modes = []
    handles = []
    with contextlib.ExitStack() as stack:
        try:
            for m in modules:
                m._buffers.update(
                    {k: b.detach().clone() for k, b in m._buffers.items() if b is not None}
                )
                if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
                    statistics.append(FixedStatistics(m))
                    modes.append((m, m.training))
                    m.training = False
                    handles.append(m.register_forward_pre_hook(statistics[-1]))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(m, nn.RNNBase) for m in modules):  # fused kernels have no vmap rule
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="TF32 acceleration")
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
            yield UntouchedModel(model, forward, statistics)
        finally:
            for handle in handles:
                handle.remove()
            for m, training in modes:
                m.training = training
            for m, saved in zip(modules, buffers):
                m._buffers.clear()
                m._buffers.update(saved)
