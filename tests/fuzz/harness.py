"""Runs foreign inputs one after another, each in a process of its own, and measures what each costs and what it opens.

The processes are forked from one that has imported everything, so that a case costs no start. How many cases a test tries is the
number it names times COMPRESS_FUZZ: 0.1 where it is not set, 1 with `make fuzz`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from hypothesis import HealthCheck, settings

from compress.checkpoints.artifact import file_digest

MOST_SECONDS = 5.0
"""CPU seconds that one foreign input may take, of all processes it starts."""

MOST_BYTES = 1_000_000_000
"""Memory that one foreign input may take beyond what the process before it had."""

_HUB = "hub-of-the-harness"
"""The folder that is the hub client's: its token is read, to be kept out of what is shown."""

_KINDS = ("Traceback (most recent call last)", "this is a fault of compress itself", "PanicException", "Segmentation fault")
_MACHINE = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64", "/opt", "/bin")
"""Where the interpreter and its libraries read of themselves."""


def cases(count: int) -> int:
    """Return how many of `count` cases are tried, by COMPRESS_FUZZ."""
    return max(1, round(count * float(os.environ.get("COMPRESS_FUZZ", "0.1"))))


def drawn(count: int) -> settings:
    """Return how Hypothesis tries so many cases: the same ones each time, however long one takes."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=cases(count), derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@dataclass(frozen=True)
class Outcome:
    """What one case did: `code` is its exit status (below 0: the signal that ended it).

    `seconds` are of CPU, `grown` is its peak of memory in bytes above that of the process it was forked from. `opened` are the
    files it opened through Python, links resolved; `decoys` those of the decoys' folder that anything opened, in whatever language.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    grown: int
    opened: tuple[str, ...]
    decoys: tuple[str, ...]

    def faults(self, codes: Iterable[int], folders: Iterable[Path]) -> list[str]:
        """Return what a foreign input must not do and this one did.

        `codes` are the exit codes that are right, `folders` all that it may open files below, beside the interpreter's own.
        """
        found = [f"exit code {self.code}"] if self.code not in set(codes) else []
        found += [f"it says {kind!r}" for kind in _KINDS if kind in self.stdout or kind in self.stderr]
        if self.seconds > MOST_SECONDS:
            found.append(f"{self.seconds:.1f} s of CPU")
        if self.grown > MOST_BYTES:
            found.append(f"{self.grown / 1e9:.2f} GB")
        allowed = [str(folder.resolve()) for folder in folders]
        allowed += [sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2]), *_MACHINE]
        allowed += [str(Path(place).resolve()) for place in sys.path if place]
        others = [path for path in self.opened if _HUB not in Path(path).parts]
        away = [path for path in others if not any(path == place or path.startswith(f"{place}/") for place in allowed)]
        found += [f"it opened {path}" for path in away]
        found += [f"it opened {path}" for path in self.decoys]
        return found


@dataclass
class Tally:
    """The worst of many cases, for the figures that `make fuzz` prints."""

    count: int = 0
    seconds: float = 0.0
    grown: int = 0
    codes: dict[int, int] = field(default_factory=lambda: dict[int, int]())

    def add(self, outcome: Outcome) -> None:
        """Count one case."""
        self.count += 1
        self.seconds = max(self.seconds, outcome.seconds)
        self.grown = max(self.grown, outcome.grown)
        self.codes[outcome.code] = self.codes.get(outcome.code, 0) + 1

    def __str__(self) -> str:
        codes = ", ".join(f"{count} × {code}" for code, count in sorted(self.codes.items()))
        return f"{self.count} cases; exit codes {codes}; most {self.seconds:.2f} s of CPU, {self.grown / 1e6:.0f} MB"


class Harness:
    """A process that has imported `modules`, and forks another for every case. Use as a context manager.

    `decoys` is a folder of files that nothing may open; they are watched by the kernel.
    """

    def __init__(self, modules: Sequence[str], decoys: Path, environment: dict[str, str] | None = None) -> None:
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        home = str(decoys.parent / _HUB)
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": home,
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzz.forkserver", str(decoys), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, **offline, **(environment or {})},
        )
        self.tally = Tally()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        cast("IO[str]", self._process.stdin).close()
        self._process.wait(timeout=60)
        cast("IO[str]", self._process.stdout).close()

    def call(self, function: str, *arguments: Any) -> Outcome:
        """Call `module:function` with arguments that JSON holds, in a new process; what it prints and raises is the outcome.

        What it returns is its exit code where that is a number, and 0 otherwise.
        """
        stdin, stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the harness ended with exit code {self._process.wait(timeout=60)}")
        told = cast("dict[str, Any]", json.loads(line))
        opened, decoys = (tuple(cast("list[str]", told.pop(name))) for name in ("opened", "decoys"))
        outcome = Outcome(**told, opened=opened, decoys=decoys)
        self.tally.add(outcome)
        return outcome

    def command(self, *arguments: str | Path) -> Outcome:
        """Run one command of the command line."""
        return self.call("tests.fuzz.forkserver:command", [str(argument) for argument in arguments])


def make_decoys(folder: Path) -> Path:
    """Fill a folder with files that look worth stealing; return it."""
    folder.mkdir()
    for name, content in {
        "secret.txt": "SECRET-OF-SOMEBODY-ELSE\n",
        "id_rsa": "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET-OF-SOMEBODY-ELSE\n",
        "secret.json": '{"password": "SECRET-OF-SOMEBODY-ELSE"}',
        "secret.jinja": "{{ 'SECRET-OF-SOMEBODY-ELSE' }}",
        "secret.py": "raise SystemExit(99)  # SECRET-OF-SOMEBODY-ELSE\n",
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def leaked(decoys: Path, folders: Iterable[Path]) -> list[Path]:
    """Return the files below some folders that are a copy of a decoy."""
    digests = {file_digest(path) for path in decoys.iterdir()}
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if file_digest(path) in digests]
