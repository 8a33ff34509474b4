"""The resources of a server's processes and GPUs under load, sampled by a thread."""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import psutil

from compress.eval.latency.results import Telemetry

INTERVAL = 0.2
"""Seconds between two samples; a shorter peak can be missed, and more samples would take time from the server's machine."""

_CACHE = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
"""vLLM's log line with the size of its KV cache, one for each worker."""

_GIB = 1024**3
_MILLI = 1000.0
"""NVML reports milliwatts and millijoules."""


@dataclass(frozen=True)
class ResourceSample:
    """One sample of a server's resources."""

    moment: float
    """By `time.perf_counter`."""

    host_bytes: int
    cpu_seconds: float
    """Since the processes started; `joules` likewise since the driver was loaded."""

    device_bytes: int | None = None
    watts: float | None = None
    utilisation: float | None = None
    joules: float | None = None


class ServerMonitor:
    """Samples a process, its descendants, and the GPUs that they use, until it is closed."""

    def __init__(self, process: int | None, cache_bytes: int | None = None) -> None:
        self._process = process
        self._cache_bytes = cache_bytes
        self._gpus = Gpus.open() if process is not None else None
        self._readings: list[ResourceSample] = []
        # By process: one that has ended keeps what it used, or the sum would fall.
        self._cpu_seconds: dict[int, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        if process is not None:
            self._thread.start()

    def during(self, began: float, seconds: float, requests: int) -> Telemetry:
        """Return the resources used from `began`, by `time.perf_counter`, on, while so many requests were answered.

        Counters are read from the samples just before and just after this period.
        """
        if self._process is None:
            return Telemetry(seconds=seconds)
        self._sample()
        with self._lock:
            readings = list(self._readings)
        # Counters of CPU and energy only mean something as differences over the load.
        before = [reading for reading in readings if reading.moment <= began][-1:]
        within = [reading for reading in readings if began < reading.moment < began + seconds]
        after = [reading for reading in readings if reading.moment >= began + seconds][:1]
        return _summarize([*before, *within, *after], seconds, requests, self._cache_bytes)

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._process is not None:
            self._thread.join()
        if self._gpus:
            self._gpus.close()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        moment, private, shared = time.perf_counter(), 0, 0
        with self._lock:
            processes = _tree(self._process)
            for process in processes:
                with suppress(psutil.Error), process.oneshot():
                    memory: Any = process.memory_info()
                    # Processes of one server share mapped libraries and weights, which a plain sum would count several times.
                    shared_bytes = int(getattr(memory, "shared", 0))
                    private, shared = private + int(memory.rss) - shared_bytes, max(shared, shared_bytes)
                    times = process.cpu_times()
                    self._cpu_seconds[process.pid] = times.user + times.system
            device_readings = self._gpus.read({process.pid for process in processes}) if self._gpus else (None, None, None, None)
            if private:  # shared memory counts once
                self._readings.append(ResourceSample(moment, private + shared, sum(self._cpu_seconds.values()), *device_readings))


def _summarize(readings: Sequence[ResourceSample], seconds: float, requests: int, cache_bytes: int | None) -> Telemetry:
    if not readings:
        return Telemetry(seconds=seconds)
    first, last = readings[0], readings[-1]
    cpu = last.cpu_seconds - first.cpu_seconds
    watts = _mean([reading.watts for reading in readings if reading.watts is not None])
    joules = last.joules - first.joules if first.joules is not None and last.joules is not None else None
    if joules is None and watts is not None:
        # Older GPUs have no energy counter (before Volta): mean power times time stands in.
        joules = watts * seconds
    return Telemetry(
        seconds=seconds,
        cpu_seconds=cpu,
        peak_host_bytes=max(reading.host_bytes for reading in readings),
        peak_device_bytes=max((reading.device_bytes for reading in readings if reading.device_bytes is not None), default=None),
        cache_bytes=cache_bytes,
        gpu_utilisation=_mean([reading.utilisation for reading in readings if reading.utilisation is not None]),
        mean_watts=watts,
        energy_joules=joules,
        joules_per_request=joules / requests if joules is not None and requests else None,
        cpu_seconds_per_request=cpu / requests if requests else None,
    )


@contextmanager
def monitor_server(process: int | None, startup_log: str) -> Generator[ServerMonitor]:
    """Monitor a server's processes; `startup_log` is its log, which tells the size of its KV cache."""
    cache_sizes = _CACHE.findall(startup_log)
    monitor = ServerMonitor(process, int(sum(float(size) for size in cache_sizes) * _GIB) if cache_sizes else None)
    try:
        yield monitor
    finally:
        monitor.close()


def combine(periods: Sequence[Telemetry], requests: int) -> Telemetry:
    """Return several periods as one: sums of counters, means over time, the highest peak."""
    seconds = sum(period.seconds for period in periods)

    def total(values: Sequence[float | None]) -> float | None:
        return sum(value for value in values if value is not None) if all(value is not None for value in values) else None

    def mean(values: Sequence[float | None]) -> float | None:
        weighted = [value * period.seconds for value, period in zip(values, periods, strict=True) if value is not None]
        return sum(weighted) / seconds if len(weighted) == len(periods) and seconds else None

    def highest(values: Sequence[int | None]) -> int | None:
        return max((value for value in values if value is not None), default=None)

    cpu, joules = total([period.cpu_seconds for period in periods]), total([period.energy_joules for period in periods])
    return Telemetry(
        seconds=seconds,
        cpu_seconds=cpu,
        peak_host_bytes=highest([period.peak_host_bytes for period in periods]),
        peak_device_bytes=highest([period.peak_device_bytes for period in periods]),
        cache_bytes=highest([period.cache_bytes for period in periods]),
        gpu_utilisation=mean([period.gpu_utilisation for period in periods]),
        mean_watts=mean([period.mean_watts for period in periods]),
        energy_joules=joules,
        joules_per_request=joules / requests if joules is not None and requests else None,
        cpu_seconds_per_request=cpu / requests if cpu is not None and requests else None,
    )


def _tree(process: int | None) -> list[psutil.Process]:
    """Return a process and its descendants; empty once it has ended."""
    with suppress(psutil.Error):
        root = psutil.Process(process)
        return [root, *root.children(recursive=True)]
    return []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Gpus:
    """This machine's GPUs by NVML; those that the monitored processes use count, or all where the driver does not tell."""

    def __init__(self, library: Any, handles: Sequence[Any]) -> None:
        self._nvml = library
        self._handles = handles
        self._used: set[int] = set()

    @classmethod
    def open(cls) -> Self | None:
        """Return the GPUs; None without the library (nvidia-ml-py) or the driver."""
        if importlib.util.find_spec("pynvml") is None:
            return None
        library: Any = importlib.import_module("pynvml")
        try:
            library.nvmlInit()
            return cls(library, [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())])
        except library.NVMLError:
            return None

    def close(self) -> None:
        """Shut NVML down."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def read(self, processes: set[int]) -> tuple[int | None, float | None, float | None, float | None]:
        """Return the processes' device memory in bytes, and their GPUs' power in watts, utilisation, and energy counter in J."""
        held_bytes = 0
        for index, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):
                processes_there = [row for row in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle) if row.pid in processes]
                self._used |= {index} if processes_there else set()
                held_bytes += sum(int(row.usedGpuMemory or 0) for row in processes_there)
        handles = [self._handles[index] for index in sorted(self._used)] or list(self._handles)
        nvml = self._nvml
        # In a container the driver reports process ids of the host: then all memory in use counts.
        device_bytes = held_bytes or self._sum(handles, lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        watts = self._sum(handles, lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / _MILLI)
        utilisation = self._sum(handles, lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        joules = self._sum(handles, lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / _MILLI)
        return (
            None if device_bytes is None else int(device_bytes),
            watts,
            None if utilisation is None else utilisation / len(handles),
            joules,
        )

    def _sum(self, handles: Sequence[Any], read: Callable[[Any], float]) -> float | None:
        """Return a sum over GPUs; None where one has no such value."""
        try:
            return sum(read(handle) for handle in handles) if handles else None
        except self._nvml.NVMLError:
            return None
