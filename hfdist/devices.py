"""The device that a rank computes on: which one, its memory, its random numbers, its streams.

What torch offers for any accelerator (`torch.accelerator`, a device's own module) is used here, so that
nothing else names one: NVIDIA's and AMD's GPUs are `cuda` to torch, Intel's `xpu`, and other vendors
register theirs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from hfdist.errors import ConfigError

T = TypeVar("T")


def resolve(device: str, local_rank: int, local_world_size: int | None = None) -> torch.device:
    """The device of a rank: one GPU each among those that torch sees, or the CPU.

    Args:
        device: "auto" (GPUs where there are any, else the CPU), "cpu", the type of an accelerator
            ("cuda"), or one of them ("cuda:1").
        local_rank: The rank's index among those of its machine.
        local_world_size: Number of ranks on this machine; at least `local_rank + 1` by default.

    Raises:
        ConfigError: There is no such device, it cannot run a step, or there are too few for the ranks.
    """
    ranks = max(local_rank + 1, local_world_size or 1)
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        if found is None or _what_it_lacks(found) is not None:
            return torch.device("cpu")
        device = found.type
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device is {device!r}: it must be auto, cpu, cuda, or one GPU like cuda:0"
        ) from error
    if asked.type == "cpu":
        return torch.device("cpu")
    count = 0
    if found is not None and found.type == asked.type:
        count = torch.accelerator.device_count()
        lacks = _what_it_lacks(found)
        if lacks is not None:
            raise ConfigError(f"device {device!r} cannot run a step: {lacks}; set device=cpu")
    return _one_of(count, device, asked, local_rank, ranks)


def is_accelerator(device: torch.device) -> bool:
    """Whether it runs beside the host, with memory of its own."""
    return device.type != "cpu"


def use(device: torch.device) -> None:
    """Make it the current one of this thread."""
    if is_accelerator(device):
        torch.accelerator.set_device_index(device)


def synchronize(device: torch.device) -> None:
    """Wait until it has done what it was given."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """A name that a person recognises: "NVIDIA H100", "cpu (x86_64)"."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    if is_accelerator(device) and name is not None:
        return str(name(device))
    return f"{device.type} ({platform.machine()})"


# -- memory ----------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in bytes: of the device's allocator, or of this process on a CPU."""
    if is_accelerator(device):
        return float(torch.accelerator.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB


def allocated_memory(device: torch.device) -> int:
    """Bytes of an accelerator that tensors hold."""
    return torch.accelerator.memory_allocated(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begin `peak_memory` of an accelerator anew."""
    torch.accelerator.reset_peak_memory_stats(device)


def memory_info(device: torch.device | int) -> tuple[int, int]:
    """(free, total) bytes of an accelerator, as its driver counts them."""
    info = getattr(torch.accelerator, "get_memory_info", None)  # not in every supported version
    if info is None:
        accelerator = torch.accelerator.current_accelerator()
        info = torch.get_device_module(accelerator).mem_get_info
    free, total = info(device)
    return int(free), int(total)


def unused_memory(device: torch.device) -> int:
    """Bytes of an accelerator that new tensors could have: free ones, and those in torch's reserve."""
    free, _ = memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)
    return free + max(reserved - torch.accelerator.memory_allocated(device), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said and "alloc" in said


# -- how numbers are computed ----------------------------------------------------------------------


@contextlib.contextmanager
def arithmetic(*, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Inside, kernels of all devices compute so; afterwards torch's settings are as before.

    Args:
        tf32: NVIDIA's GPUs round the factors of float32's matrix products and convolutions to 11 bits.
            Torch's own default is neither: it rounds convolutions alone.
        deterministic: Kernels that add up in a changing order are replaced, or, where torch has no other,
            refused. False leaves what the program has set.
    """
    with contextlib.ExitStack() as stack:
        _set_tf32(stack, tf32)
        if deterministic:
            # cuBLAS reads it when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            stack.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            stack.callback(torch._C._set_cudnn_benchmark, torch._C._get_cudnn_benchmark())
            torch.use_deterministic_algorithms(True)
            torch._C._set_cudnn_benchmark(False)
        yield


def _set_tf32(stack: contextlib.ExitStack, tf32: bool) -> None:
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    try:
        before = matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer names, each by itself: put back by them
        for own in (matmul, cudnn.conv, cudnn.rnn):
            stack.callback(setattr, own, "fp32_precision", own.fp32_precision)
            own.fp32_precision = "tf32" if tf32 else "ieee"
        return

    def put(of_products: bool, of_convolutions: bool) -> None:
        matmul.allow_tf32, cudnn.allow_tf32 = of_products, of_convolutions

    stack.callback(put, *before)
    put(tf32, tf32)


# -- random numbers --------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Inside, the global generators of host and device start from a seed (None: from where they are);
    afterwards they are as before.

    Of this device alone: torch.manual_seed queues a call for every GPU that is not in use, with the stack of
    its caller.
    """
    before = rng_states(device)
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if is_accelerator(device):
                with torch.accelerator.device_index(_index(device)):
                    torch.get_device_module(device).manual_seed(seed)
        yield
    finally:
        set_rng_states(device, before)


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators of the host and, if it is another one, of the device, by type."""
    states = {"cpu": torch.get_rng_state()}
    if is_accelerator(device):
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(device: torch.device, states: Mapping[str, Tensor]) -> None:
    """Set what `rng_states` gave, on a device of this type or on another."""
    torch.set_rng_state(states["cpu"])
    if is_accelerator(device) and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


# -- copies from the host --------------------------------------------------------------------------


class CopyStream:
    """Copies to a device beside what it computes: from pinned memory, on a stream of their own.

    Args:
        device: Where to; what is on the CPU already is not copied for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None
        if is_accelerator(device):
            self._stream = torch.Stream(device=device)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; use it after `wait` only."""
        if self._stream is None or tensor.device.type != "cpu":
            return tensor.to(self._device)
        with self._stream:
            source = tensor.pin_memory() if _pins_memory() else tensor
            return source.to(self._device, non_blocking=True)

    def event(self) -> torch.Event | None:
        """What `wait` waits for: the copies up to now."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: torch.Event | None, tensors: Sequence[Tensor]) -> None:
        """What the calling thread computes from now on comes after the copies before the event, of which
        these are; the thread itself does not wait."""
        if event is None:
            return
        stream = torch.accelerator.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors:
            if tensor.device == self._device:
                tensor.record_stream(stream)  # their memory is not given away before that


@cache
def copy_stream(device: torch.device) -> CopyStream:
    """The one of this process and device."""
    return CopyStream(device)


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on the device, in the order of what is computed there; the host does not wait,
    where it has pinned memory."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    if is_accelerator(device) and _pins_memory():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@cache
def _pins_memory() -> bool:
    """Whether the accelerator can copy from the host's memory on its own."""
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError:
        return False


# -- graphs of kernels -----------------------------------------------------------------------------


class NotCaptured(Exception):
    """Why there is no graph of a computation."""


@cache
def _capture_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device=device)


@contextlib.contextmanager
def to_be_captured(device: torch.device) -> Iterator[None]:
    """Inside, an accelerator computes on the stream that `captured` captures. Autograd differentiates on the
    stream of the forward pass: its passes must be made here for their derivatives to be captured."""
    if not is_accelerator(device):
        yield
        return
    stream, outer = _capture_stream(device), torch.accelerator.current_stream(device)
    # In turns, so that memory of one stream is not written while the other reads it.
    stream.wait_stream(outer)
    try:
        with stream:
            yield
    finally:
        outer.wait_stream(stream)


def captured(device: torch.device, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A graph of the kernels of a computation, which was run before inside `to_be_captured`.

    Args:
        device: Where it runs.
        compute: Reads and writes tensors that stay where they are; the host looks at none of them.

    Returns:
        What runs the graph, and the computation's results, which hold numbers after each such run.

    Raises:
        NotCaptured: The device has no graphs, or does something here that they cannot hold.
    """
    if not is_accelerator(device):
        raise NotCaptured(f"the device {device.type} has no graphs")
    kind = getattr(torch.accelerator, "Graph", None)  # not in every supported version
    if kind is None:
        kind = getattr(torch.get_device_module(device), f"{device.type.upper()}Graph", None)
    if kind is None:
        raise NotCaptured(f"torch {torch.__version__} has no graphs of {device.type}")
    stream = _capture_stream(device)
    try:
        graph = kind()
        torch.accelerator.synchronize(device)
        with stream:
            graph.capture_begin()
            try:
                results = compute()
            finally:
                graph.capture_end()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotCaptured(str(error).strip().splitlines()[0]) from error

    def run() -> None:
        outer = torch.accelerator.current_stream(device)
        stream.wait_stream(outer)
        with stream:
            graph.replay()
        outer.wait_stream(stream)

    return run, results


# -- finding one -----------------------------------------------------------------------------------


@cache
def _what_it_lacks(device: torch.device) -> str | None:
    """What a step needs and this accelerator has not; None: nothing."""
    try:
        # Losses, weights and the solver's scalars are summed in it.
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        return f"it has no float64 ({str(error).splitlines()[0]})"
    return None


def _one_of(
    count: int, device: str, asked: torch.device, local_rank: int, ranks: int
) -> torch.device:
    kind = asked.type
    if asked.index is None:
        if ranks > count:
            raise ConfigError(
                f"{_count(ranks, 'worker')} but {_count(count, 'GPU')} on this machine: every worker "
                f"needs a GPU of its own; lower launch.workers to {count}, or set device=cpu"
                if count
                else f"device {device!r}: {_count(ranks, 'worker')} but 0 GPUs on this machine: "
                f"set device=cpu, or see why torch.{kind}.is_available() is false"
            )
        return torch.device(kind, local_rank)
    if asked.index >= count:
        raise ConfigError(
            f"device is {device!r} but this machine has {_count(count, 'GPU')}"
            + (f" ({kind}:0 to {kind}:{count - 1})" if count > 1 else "")
        )
    if ranks > 1:
        raise ConfigError(
            f"device {device!r} names 1 GPU for {ranks} workers: set device={kind}, and "
            f"{_VISIBLE.get(kind, 'its variable for visible devices')} to choose among the GPUs"
        )
    return torch.device(kind, asked.index)


_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.accelerator.current_device_index()


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
