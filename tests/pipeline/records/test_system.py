"""How busy a node is, by the kernel's numbers, and by a stand-in for NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.records.system import SystemSampler


def refused(_: object) -> None:
    raise RuntimeError("not supported")


def test_means_of_what_was_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In MB of 10^6 bytes; what a GPU does not tell is left out."""
    used = iter([1_000_000_000, 3_000_000_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=next(used), total=4_000_000_000),
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=80),
        nvmlDeviceGetPowerUsage=refused,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    sampler = SystemSampler(tmp_path, interval_seconds=1000.0)
    sampler._sample()
    found = sampler.read()
    sampler.close()
    assert found["gpu_0_memory_usage_megabytes"] == 2000.0
    assert found["gpu_0_memory_usage_percentage"] == 50.0
    assert found["gpu_0_utilization_percentage"] == 80.0
    assert "gpu_0_power_usage_watts" not in found
    assert 0 < found["system_memory_usage_percentage"] < 100
    assert found["disk_available_megabytes"] > 0
