"""A stand-in accelerator: a torch device of its own type, whose memory and kernels are the host's; counted.

`standin.cpp` says how. `load` registers it in this process for good, so tests that use it run in a process of
their own (see `devices.on`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "standin"
SOURCE = Path(__file__).with_name("standin.cpp")
FLAGS = ["-O1", "-g0"]


def why_not() -> str | None:
    """Why it cannot be built here; None: it can."""
    compiler = os.environ.get("CXX", "c++")
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    return f"the stand-in accelerator is built with {' and '.join(missing)}" if missing else None


def build() -> Path:
    """The library, built once for each source, torch and machine's user; processes wait for each other."""
    key = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode() + SOURCE.read_bytes())
    folder = _cache() / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library, built = folder / f"{NAME}.so", folder / "built"
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_file():
            from torch.utils.cpp_extension import load as compile_and_load

            (folder / "lock").unlink(missing_ok=True)  # torch's own, of a process that was killed
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # (no CUDA here)
            compile_and_load(
                NAME,
                [str(SOURCE)],
                extra_cflags=FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
            built.touch()
    return library


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "hfdist-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"hfdist-tests-{os.getuid()}"
    return folder


@cache
def load() -> None:
    """Register the device in this process; afterwards torch knows `standin:0` and `standin:1`."""
    library = build()
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(library))
    torch.ops.standin.install()
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    _register_cells()
    _register_autocast()


def _device_module() -> types.ModuleType:
    """`torch.standin`: what torch expects of a device's module."""
    ops = torch.ops.standin
    module: Any = types.ModuleType(f"torch.{NAME}")

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device
        found = torch.device(device).index
        return ops.current_device() if found is None else found

    def manual_seed_all(seed: int) -> None:
        for generator in module.default_generators:
            generator.manual_seed(seed)

    def set_rng_state(state: Tensor, device: Any = NAME) -> None:
        module.default_generators[index(device)].set_state(state)

    module.default_generators = tuple(ops.default_generator(k) for k in range(2))
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = ops.current_device
    module.set_device = lambda device: ops.set_device(index(device))
    module.manual_seed = lambda seed: module.default_generators[ops.current_device()].manual_seed(
        seed
    )
    module.manual_seed_all = manual_seed_all
    module.get_rng_state = lambda device=NAME: module.default_generators[index(device)].get_state()
    module.set_rng_state = set_rng_state
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_device_name = lambda device=None: "stand-in accelerator"
    return module


# -- kernels that the host does not have -------------------------------------------------------------------

_kept: list[torch.library.Library] = []


def _register_cells() -> None:
    """Accelerators have recurrent cells of their own, which torch's recurrent layers call there."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)

    def lstm(
        igates: Tensor,
        hgates: Tensor,
        cx: Tensor,
        ibias: Tensor | None = None,
        hbias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates = igates + hgates
        for bias in (ibias, hbias):
            gates = gates if bias is None else gates + bias
        i, f, g, o = gates.chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cy = f * cx + i * g
        return o * cy.tanh(), cy, torch.cat((i, f, g, o), 1)

    def lstm_backward(
        grad_hy: Tensor | None,
        grad_cy: Tensor | None,
        cx: Tensor,
        cy: Tensor,
        workspace: Tensor,
        has_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        i, f, g, o = workspace.chunk(4, 1)
        tanh_cy = cy.tanh()
        dh = torch.zeros_like(cy) if grad_hy is None else grad_hy
        dc = dh * o * (1 - tanh_cy * tanh_cy)
        dc = dc if grad_cy is None else dc + grad_cy
        gates = torch.cat(
            (
                dc * g * i * (1 - i),
                dc * cx * f * (1 - f),
                dc * i * (1 - g * g),
                dh * tanh_cy * o * (1 - o),
            ),
            1,
        )
        return gates, dc * f, gates.sum(0) if has_bias else gates.new_empty(0)

    def gru(
        igates: Tensor,
        hgates: Tensor,
        hx: Tensor,
        ibias: Tensor | None = None,
        hbias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        igates = igates if ibias is None else igates + ibias
        hgates = hgates if hbias is None else hgates + hbias
        ir, ii, inew = igates.chunk(3, 1)
        hr, hi, hn = hgates.chunk(3, 1)
        r, z = (ir + hr).sigmoid(), (ii + hi).sigmoid()
        n = (inew + r * hn).tanh()
        return (hx - n) * z + n, torch.cat((r, z, n, hx, hn), 1)

    def gru_backward(
        grad_hy: Tensor, workspace: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        r, z, n, hx, hn = workspace.chunk(5, 1)
        dn = grad_hy * (1 - z) * (1 - n * n)
        dz = grad_hy * (hx - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        di, dh = torch.cat((dr, dz, dn), 1), torch.cat((dr, dz, dn * r), 1)
        none = di.new_empty(0)
        return (
            di,
            dh,
            grad_hy * z,
            di.sum(0) if has_bias else none,
            dh.sum(0) if has_bias else none,
        )

    library.impl("_thnn_fused_lstm_cell", lstm, "PrivateUse1")
    library.impl("_thnn_fused_lstm_cell_backward_impl", lstm_backward, "PrivateUse1")
    library.impl("_thnn_fused_gru_cell", gru, "PrivateUse1")
    library.impl("_thnn_fused_gru_cell_backward", gru_backward, "PrivateUse1")


_IN_LOWER_PRECISION = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution")


def _register_autocast() -> None:
    """Matrix products in autocast's dtype, as on other devices; all else as its arguments are."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)

    def lower(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME)
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
            ):
                args = tuple(
                    a.to(dtype)
                    if isinstance(a, Tensor) and a.device.type == NAME and a.dtype == torch.float32
                    else a
                    for a in args
                )
                return function(*args, **kwargs)

        return run

    for name in _IN_LOWER_PRECISION:
        library.impl(name, lower(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")


# -- counting ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Counts:
    """What happened inside `counted`."""

    counts: dict[str, int] = field(default_factory=dict)
    """Calls by kind: host_read, to_host, to_device (the host waits), to_device_in_background, synchronize,
    kernel (launched by the host), replay (of a graph of kernels); and bytes, by kind_bytes."""
    allocations: list[int] = field(default_factory=list)
    """Bytes of each, in order."""

    def __getitem__(self, kind: str) -> int:
        return self.counts.get(kind, 0)


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what the program asks of the device inside."""
    ops = torch.ops.standin
    ops.reset()
    found = Counts()
    try:
        yield found
    finally:
        found.counts.update(ops.counts())
        found.allocations += list(ops.allocations())
