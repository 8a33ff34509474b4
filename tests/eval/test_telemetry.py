"""What is sampled of processes and GPUs: of this very process, and of an NVML that tells known numbers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from compress.eval.latency.results import Telemetry
from compress.eval.latency.telemetry import Gpus, ServerMonitor, combine, monitor_server


class NvmlError(Exception):
    """What the library raises."""


@dataclass
class Device:
    """A GPU's numbers."""

    used: int
    watts: float = 100.0
    busy: int = 50
    joules: float | None = 1000.0
    processes: dict[int, int] = field(default_factory=lambda: dict[int, int]())


def nvml() -> Any:
    """Return the library's functions, over such GPUs."""

    def processes(device: Device) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in device.processes.items()]

    def memory(device: Device) -> Any:
        return SimpleNamespace(used=device.used)

    def milliwatts(device: Device) -> float:
        return 1000 * device.watts

    def rates(device: Device) -> Any:
        return SimpleNamespace(gpu=device.busy)

    def millijoules(device: Device) -> float:
        if device.joules is None:
            raise NvmlError
        return 1000 * device.joules

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlDeviceGetComputeRunningProcesses=processes,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetPowerUsage=milliwatts,
        nvmlDeviceGetUtilizationRates=rates,
        nvmlDeviceGetTotalEnergyConsumption=millijoules,
    )


def test_own_process_is_seen() -> None:
    with monitor_server(os.getpid(), "") as watch:
        began = time.perf_counter()
        total = sum(range(200_000))
        used = watch.during(began, time.perf_counter() - began, 4)
    assert total
    assert used.peak_host_bytes is not None
    assert used.peak_host_bytes > 10 * 1024**2
    assert used.memory_bytes == used.peak_host_bytes
    assert used.cpu_seconds is not None
    assert used.cpu_seconds_per_request == used.cpu_seconds / 4
    assert used.peak_device_bytes is None or used.mean_watts is not None


def test_server_elsewhere_is_not_seen() -> None:
    with monitor_server(None, "") as watch:
        assert watch.during(0.0, 2.5, 1) == Telemetry(seconds=2.5)


def test_process_that_is_gone_is_no_fault() -> None:
    watch = ServerMonitor(2**22 + 1)
    assert watch.during(0.0, 1.0, 1) == Telemetry(seconds=1.0)
    watch.close()


def test_gpus_of_the_watched_processes_count() -> None:
    devices = [Device(900, processes={7: 300, 8: 200}), Device(800, watts=30.0, processes={9: 800})]
    assert Gpus(nvml(), devices).read({7, 8}) == (500, 100.0, 0.5, 1000.0)


def test_all_gpus_count_where_no_process_is_known() -> None:
    devices = [Device(900, processes={1: 900}), Device(800, watts=30.0, busy=0)]
    assert Gpus(nvml(), devices).read({7}) == (1700, 130.0, 0.25, 2000.0)
    assert Gpus(nvml(), [Device(5, joules=None)]).read(set()) == (5, 100.0, 0.5, None)
    assert Gpus(nvml(), []).read({7}) == (None, None, None, None)


def test_cache_is_no_part_of_the_memory_on_a_gpu() -> None:
    assert Telemetry(seconds=1, peak_host_bytes=9, peak_device_bytes=100, cache_bytes=60).memory_bytes == 40
    assert Telemetry(seconds=1, peak_host_bytes=9, peak_device_bytes=100).memory_bytes == 100
    with monitor_server(os.getpid(), "INFO Available KV cache memory: 1.5 GiB\nAvailable KV cache memory: 0.5 GiB") as watch:
        assert watch.during(time.perf_counter(), 0.0, 1).cache_bytes == 2 * 1024**3


def test_stretches_are_summed() -> None:
    first = Telemetry(seconds=1, cpu_seconds=2, peak_host_bytes=5, mean_watts=100, energy_joules=100, gpu_utilisation=1.0)
    second = Telemetry(seconds=3, cpu_seconds=4, peak_host_bytes=3, mean_watts=20, energy_joules=60, gpu_utilisation=0.0)
    both = combine([first, second], 10)
    assert (both.seconds, both.cpu_seconds, both.peak_host_bytes, both.energy_joules) == (4, 6, 5, 160)
    assert (both.mean_watts, both.gpu_utilisation) == (pytest.approx(40), pytest.approx(0.25))
    assert (both.joules_per_request, both.cpu_seconds_per_request) == (16, 0.6)
    assert combine([first, Telemetry(seconds=1)], 1).energy_joules is None
