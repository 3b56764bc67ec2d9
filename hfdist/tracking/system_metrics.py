"""Use of the machine, sampled while a run goes on, under MLflow's own names for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

Values = dict[str, float]


class SystemSampler:
    """Calls `record(values, sample number)` every so many seconds, in the background.

    Args:
        record: Takes what was sampled.
        every: Seconds.
        first: Number of the first sample.
    """

    def __init__(self, record: Callable[[Values, int], None], every: float, first: int) -> None:
        self._record, self._every, self._number = record, every, first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hfdist-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample, so that short runs have one, and end."""
        self._over.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        import psutil

        psutil.cpu_percent()  # the first call has nothing to compare with
        start = psutil.net_io_counters()
        is_over = False
        while not is_over:
            is_over = self._over.wait(self._every)
            with contextlib.suppress(Exception):  # a sample less is no reason to disturb a run
                self._record(_sample(psutil, start), self._number)
                self._number += 1


def _sample(psutil: object, start: object) -> Values:
    p = psutil
    memory, disk, net = p.virtual_memory(), p.disk_usage("/"), p.net_io_counters()  # type: ignore[attr-defined]
    values = {
        "system/cpu_utilization_percentage": float(p.cpu_percent()),  # type: ignore[attr-defined]
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": float(memory.percent),
        "system/disk_usage_percentage": float(disk.percent),
        "system/network_receive_megabytes": (net.bytes_recv - start.bytes_recv) / 1e6,  # type: ignore[attr-defined]
        "system/network_transmit_megabytes": (net.bytes_sent - start.bytes_sent) / 1e6,  # type: ignore[attr-defined]
    }
    return values | _gpus()


def _gpus() -> Values:
    import torch

    from hfdist.devices import memory_info

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or not torch.get_device_module(device).is_initialized():
        return {}
    values: Values = {}
    for k in range(torch.accelerator.device_count()):
        free, total = memory_info(k)
        values[f"system/gpu_{k}_memory_usage_megabytes"] = (total - free) / 1e6
        values[f"system/gpu_{k}_memory_usage_percentage"] = 100.0 * (total - free) / total
        with contextlib.suppress(Exception):  # needs nvidia's management library
            used = torch.get_device_module(device).utilization(k)
            values[f"system/gpu_{k}_utilization_percentage"] = float(used)
    return values
