"""How long a step took and how much memory it needed at most."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_CLEAR_PEAK = "5"  # proc(5), clear_refs: resets the resident set's high-water mark


@dataclass
class Meter:
    """Measures the block it surrounds: seconds, and the process's peak memory on host and device in bytes.

    On systems without Linux's /proc the host's peak is that of the whole process so far; `peak_device_bytes` is 0 without CUDA.
    """

    seconds: float = 0.0
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0

    def __enter__(self) -> Meter:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak so far stands
            Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
        # Not imported here: most steps need no torch, and importing it takes seconds and memory that would be measured.
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_host_bytes = _peak_host()
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available():
            self.peak_device_bytes = int(torch.cuda.max_memory_allocated())


def _peak_host() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Kilobytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
