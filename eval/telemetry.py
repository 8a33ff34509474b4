"""What a server's processes and GPUs use while it is under load, sampled by a thread."""

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

from compress.eval.latency_results import Telemetry

INTERVAL = 0.2
"""Seconds between two samples; a peak that is shorter can be missed."""
_CACHE = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
_GIB = 1024**3
_MILLI = 1000.0


@dataclass(frozen=True)
class Reading:
    """What one moment's look gave: bytes held, processor seconds so far; of the GPUs watts, how busy, joules so far."""

    moment: float
    host_bytes: int
    cpu_seconds: float
    device_bytes: int | None = None
    watts: float | None = None
    busy: float | None = None
    joules: float | None = None


class Watch:
    """Samples a process, all that it started, and the GPUs they use, until it is closed."""

    def __init__(self, process: int | None, cache_bytes: int | None = None) -> None:
        self._process = process
        self._cache_bytes = cache_bytes
        self._gpus = Gpus.open() if process is not None else None
        self._readings: list[Reading] = []
        self._spent: dict[int, float] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        if process is not None:
            self._thread.start()

    def during(self, began: float, seconds: float, requests: int) -> Telemetry:
        """Return what was used in a stretch in which so many requests were answered; `began` is by `time.perf_counter`.

        Counters are taken from the samples next to the stretch's ends, outside it.
        """
        if self._process is None:
            return Telemetry(seconds=seconds)
        self._sample()
        with self._lock:
            readings = list(self._readings)
        before = [reading for reading in readings if reading.moment <= began][-1:]
        within = [reading for reading in readings if began < reading.moment < began + seconds]
        after = [reading for reading in readings if reading.moment >= began + seconds][:1]
        return _telemetry([*before, *within, *after], seconds, requests, self._cache_bytes)

    def close(self) -> None:
        """Stop sampling."""
        self._ending.set()
        if self._process is not None:
            self._thread.join()
        if self._gpus:
            self._gpus.close()

    def _run(self) -> None:
        while not self._ending.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        moment, private, shared = time.perf_counter(), 0, 0
        with self._lock:
            processes = _tree(self._process)
            for process in processes:
                with suppress(psutil.Error), process.oneshot():
                    memory: Any = process.memory_info()
                    own = int(getattr(memory, "shared", 0))
                    private, shared = private + int(memory.rss) - own, max(shared, own)
                    times = process.cpu_times()
                    self._spent[process.pid] = times.user + times.system
            held = self._gpus.read({process.pid for process in processes}) if self._gpus else (None, None, None, None)
            if private:  # libraries that processes share are held once
                self._readings.append(Reading(moment, private + shared, sum(self._spent.values()), *held))


def _telemetry(readings: Sequence[Reading], seconds: float, requests: int, cache_bytes: int | None) -> Telemetry:
    if not readings:
        return Telemetry(seconds=seconds)
    first, last = readings[0], readings[-1]
    cpu = last.cpu_seconds - first.cpu_seconds
    watts = _mean([reading.watts for reading in readings if reading.watts is not None])
    joules = last.joules - first.joules if first.joules is not None and last.joules is not None else None
    if joules is None and watts is not None:
        joules = watts * seconds
    return Telemetry(
        seconds=seconds,
        cpu_seconds=cpu,
        peak_host_bytes=max(reading.host_bytes for reading in readings),
        peak_device_bytes=max((reading.device_bytes for reading in readings if reading.device_bytes is not None), default=None),
        cache_bytes=cache_bytes,
        gpu_utilisation=_mean([reading.busy for reading in readings if reading.busy is not None]),
        mean_watts=watts,
        energy_joules=joules,
        joules_per_request=joules / requests if joules is not None and requests else None,
        cpu_seconds_per_request=cpu / requests if requests else None,
    )


@contextmanager
def watching(process: int | None, said: str) -> Generator[Watch]:
    """Give a watch over a server's processes; `said` is what it logged while it came up, which tells the size of its cache."""
    found = _CACHE.findall(said)
    watch = Watch(process, int(sum(float(size) for size in found) * _GIB) if found else None)
    try:
        yield watch
    finally:
        watch.close()


def combine(stretches: Sequence[Telemetry], requests: int) -> Telemetry:
    """Return several stretches as one: sums of what was spent, means over time, the highest peak."""
    seconds = sum(stretch.seconds for stretch in stretches)

    def total(values: Sequence[float | None]) -> float | None:
        return sum(value for value in values if value is not None) if all(value is not None for value in values) else None

    def mean(values: Sequence[float | None]) -> float | None:
        weighted = [value * one.seconds for value, one in zip(values, stretches, strict=True) if value is not None]
        return sum(weighted) / seconds if len(weighted) == len(stretches) and seconds else None

    def most(values: Sequence[int | None]) -> int | None:
        return max((value for value in values if value is not None), default=None)

    cpu, joules = total([one.cpu_seconds for one in stretches]), total([one.energy_joules for one in stretches])
    return Telemetry(
        seconds=seconds,
        cpu_seconds=cpu,
        peak_host_bytes=most([one.peak_host_bytes for one in stretches]),
        peak_device_bytes=most([one.peak_device_bytes for one in stretches]),
        cache_bytes=most([one.cache_bytes for one in stretches]),
        gpu_utilisation=mean([one.gpu_utilisation for one in stretches]),
        mean_watts=mean([one.mean_watts for one in stretches]),
        energy_joules=joules,
        joules_per_request=joules / requests if joules is not None and requests else None,
        cpu_seconds_per_request=cpu / requests if cpu is not None and requests else None,
    )


def _tree(process: int | None) -> list[psutil.Process]:
    """Return a process and all that descend from it; empty once it is gone."""
    with suppress(psutil.Error):
        root = psutil.Process(process)
        return [root, *root.children(recursive=True)]
    return []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Gpus:
    """The GPUs that this machine's driver shows, by NVML; those that the watched processes use count, all where none is told."""

    def __init__(self, library: Any, handles: Sequence[Any]) -> None:
        self._nvml = library
        self._handles = handles
        self._used: set[int] = set()

    @classmethod
    def open(cls) -> Self | None:
        """Return the GPUs; None where the library (nvidia-ml-py) or the driver is not there."""
        if importlib.util.find_spec("pynvml") is None:
            return None
        library: Any = importlib.import_module("pynvml")
        try:
            library.nvmlInit()
            return cls(library, [library.nvmlDeviceGetHandleByIndex(place) for place in range(library.nvmlDeviceGetCount())])
        except library.NVMLError:
            return None

    def close(self) -> None:
        """Let go of the library."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def read(self, processes: set[int]) -> tuple[int | None, float | None, float | None, float | None]:
        """Return the bytes that the processes hold; of the GPUs they use the watts, how busy they are, and the joules so far."""
        held = 0
        for place, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):
                own = [row for row in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle) if row.pid in processes]
                self._used |= {place} if own else set()
                held += sum(int(row.usedGpuMemory or 0) for row in own)
        handles = [self._handles[place] for place in sorted(self._used)] or list(self._handles)
        nvml = self._nvml
        # In a container the driver tells other process ids: then all that is held counts.
        device = held or self._sum(handles, lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        watts = self._sum(handles, lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / _MILLI)
        busy = self._sum(handles, lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        joules = self._sum(handles, lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / _MILLI)
        return None if device is None else int(device), watts, None if busy is None else busy / len(handles), joules

    def _sum(self, handles: Sequence[Any], read: Callable[[Any], float]) -> float | None:
        """Return a sum over GPUs; None where one does not tell."""
        try:
            return sum(read(handle) for handle in handles) if handles else None
        except self._nvml.NVMLError:
            return None
