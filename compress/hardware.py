"""What machine this is, found out without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import psutil


@cache
def gpus() -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs that the driver shows; empty where there is no driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ()
    found = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip()) if found.returncode == 0 else ()


def default_device() -> str:
    """Return the device that stages use: `cuda` where there is a GPU, else `cpu`."""
    return "cuda" if gpus() else "cpu"


def processor() -> str:
    """Return the processor's name."""
    return _told("model name") or platform.processor() or platform.machine()


@cache
def processor_features() -> frozenset[str]:
    """Return what an x86 processor can do, as Linux names it (`avx2`, `avx512f`, …); empty for others, and where it is not told."""
    return frozenset(_told("flags").split())


def _told(what: str) -> str:
    """Return what Linux tells of the first processor, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    rows = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in rows if name.strip() == what), "")


def describe() -> dict[str, object]:
    """Return what reports and artifacts say of the machine."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": list(gpus()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
