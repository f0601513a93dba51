"""How busy a node is: CPU, memory, disk, network and GPUs, under the names that MLflow's pages group as system metrics.

MLflow's own monitor sends by itself, and gives up where a server does not answer; here one rank of each node samples,
and its numbers go the way of all others.
"""

from __future__ import annotations

import importlib
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_INTERVAL_SECONDS = 5.0
_MB = 1e6


class SystemSampler:
    """Samples this node, in a thread, between two calls of `read`. `disk`: a folder on the disk that counts."""

    def __init__(self, disk: Path, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        self._disk, self._interval = disk, interval_seconds
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._gpus = _gpus()
        self._sent = _network()
        psutil.cpu_percent()  # counts from now on
        self._thread = threading.Thread(target=self._work, name="system", daemon=True)
        self._thread.start()

    def read(self) -> dict[str, float]:
        """The mean of each number since the last call; of network traffic the sum, in MB (10^6 bytes)."""
        self._sample()
        with self._lock:
            found = {name: self._sums[name] / self._counts[name] for name in self._sums}
            self._sums.clear()
            self._counts.clear()
            before, self._sent = self._sent, _network()
        received, transmitted = (max(0.0, now - then) for now, then in zip(self._sent, before, strict=True))
        return {**found, "network_receive_megabytes": received, "network_transmit_megabytes": transmitted}

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(self._interval)

    def _work(self) -> None:
        while not self._over.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        found = _host(self._disk)
        for number, handle in enumerate(self._gpus):
            found |= {f"gpu_{number}_{name}": value for name, value in _gpu(handle).items()}
        with self._lock:
            for name, value in found.items():
                self._sums[name] += value
                self._counts[name] += 1


def _host(disk: Path) -> dict[str, float]:
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MB,
        "system_memory_usage_percentage": memory.percent,
    }
    with suppress(OSError):
        usage = psutil.disk_usage(str(disk))
        found |= {"disk_usage_percentage": usage.percent, "disk_available_megabytes": usage.free / _MB}
    return found


def _network() -> tuple[float, float]:
    """(MB received, MB sent) since the node's start."""
    counters = psutil.net_io_counters()
    return (counters.bytes_recv / _MB, counters.bytes_sent / _MB) if counters else (0.0, 0.0)


def _gpus() -> list[Any]:
    """A handle of NVML's for each GPU of the node; none where there is no driver."""
    with suppress(Exception):  # NVML's own errors, or no package
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    return []


def _gpu(handle: Any) -> dict[str, float]:
    nvml, found = importlib.import_module("pynvml"), {}
    with suppress(Exception):  # what a device does not tell is left out: a MIG slice, a virtual GPU
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        found["memory_usage_megabytes"] = memory.used / _MB
        found["memory_usage_percentage"] = 100 * memory.used / memory.total
    with suppress(Exception):
        found["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with suppress(Exception):
        found["power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return found
