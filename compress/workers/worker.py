"""Workers: programs that run in another process, most of them in another environment, and never outlive this process.

A server answers requests (`server.py`), a script does one job (`run_job`), anything else talks with its worker as it likes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from compress.errors import ServerError, StoreError
from compress.files import write_json
from compress.progress import Progress
from compress.untrusted.redaction import redact_value, secrets_known
from compress.workers.environment import require
from compress.workers.exit_reason import describe_exit, read_log

_GUARD = Path(__file__).with_name("guard.py")
_JOB = Path(__file__).with_name("job.py")
_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: vLLM needs some to end its engine processes and to free GPU memory."""

_POLL_SECONDS = 0.25
"""Seconds between two polls of a worker: whether it is ready, how far it is."""

_PYTHON_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""Would make another environment's interpreter import packages of this one."""

Launcher = Callable[[Sequence[str], Mapping[str, str], BinaryIO], subprocess.Popen[bytes]]
"""Starts a command with environment variables, its output going to a file. The process leads a group of its own, ends when its
standard input does, and reads a first line from there: the secrets that its log must not have, as JSON."""


@dataclass(frozen=True)
class Worker:
    """A started worker: a process in a group of its own."""

    name: str
    """What messages call it."""

    process: subprocess.Popen[bytes]
    """The guard that leads its process group."""

    log: Path
    """Receives its output."""

    start: int
    """The byte of the log at which its output begins: earlier workers wrote to the same file."""

    def check(self) -> None:
        """Check that it is still running.

        Raises:
            ServerError: it exited; the message holds its last log lines.
        """
        if self.process.poll() is not None:
            raise ServerError(f"{self.name} ended{self.exit_reason()}")

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready` returns True, for at most `seconds`.

        Raises:
            ServerError: it exited, or was not ready in time; the message holds its last log lines.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended while it was loading{self.exit_reason()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer within {seconds:g} seconds; raise startup_seconds if the log shows that it is "
                    f"still loading{self.exit_reason()}"
                )
            time.sleep(_POLL_SECONDS)

    def read_log(self) -> str:
        """Return what it has printed so far."""
        return read_log(self.log, self.start)

    def exit_reason(self) -> str:
        """Return the end of a message on its exit; see `describe_exit`."""
        return describe_exit(self.read_log(), self.log)


def launch_guarded(command: Sequence[str], variables: Mapping[str, str], sink: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a command on this machine, under `guard.py`; see `Launcher`.

    Raises:
        OSError: it cannot be run.
    """
    return subprocess.Popen(
        [sys.executable, "-I", str(_GUARD), str(_GRACE), *command],
        # The lifeline: when this process ends in any way, even by kill -9, the pipe closes and the guard ends its group.
        stdin=subprocess.PIPE,
        stdout=sink,
        stderr=subprocess.STDOUT,
        env=dict(variables),
        # A group of its own: Ctrl-C at the terminal goes to this process alone, which then ends workers in order.
        start_new_session=True,
    )


@contextmanager
def run_worker(
    name: str, command: Sequence[str], variables: Mapping[str, str], log: Path, launch: Launcher = launch_guarded
) -> Generator[Worker]:
    """Start a worker in a process group of its own; the whole group is ended when the context ends or this process dies.

    Raises:
        StoreError: the log cannot be written.
        ServerError: the command cannot be run.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = log.open("ab")
    except OSError as error:
        raise StoreError(f"{log}: the log of {name} cannot be written ({error}); choose a folder that can be written to") from error
    with sink:
        start = sink.tell()
        try:
            process = launch(command, variables, sink)
        except OSError as error:
            raise ServerError(f"{name} cannot be started ({error}): {command[0]}") from error
    try:
        _send_secrets(process)
        yield Worker(name=name, process=process, log=log, start=start)
    finally:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        # The guard has killed its group by then, so that the next server finds the GPU's memory free.
        process.wait()
        with suppress(ProcessLookupError):  # the group is gone, unless the guard was killed
            os.killpg(process.pid, signal.SIGKILL)


def _send_secrets(process: subprocess.Popen[bytes]) -> None:
    """Send the guard the secrets to keep out of the log: by a pipe, as other users can read its command and environment."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it exited already; its log has the reason
            process.stdin.write(json.dumps(secrets_known()).encode() + b"\n")
            process.stdin.flush()


def python_command(environment: str, *arguments: str) -> list[str]:
    """Return the command of an environment's Python: isolated, as a script's own folder must not be importable, and unbuffered.

    Raises:
        MissingError: the environment is not installed.
    """
    return [str(require(environment).python), "-I", "-u", *arguments]


def variables_with(added: Mapping[str, str], removed: Collection[str] = ()) -> dict[str, str]:
    """Return this process's environment variables for a worker in another environment, with some added and others removed."""
    kept = {name: value for name, value in os.environ.items() if name not in _PYTHON_VARIABLES and name not in removed}
    return kept | dict(added)


@dataclass(frozen=True)
class LogProgress:
    """How far a job is, by its log."""

    pattern: re.Pattern[bytes]
    """Matches a progress bar; its groups are the units done and those in all."""

    loading: str
    """The unit of what is done before the first bar: one of it."""

    verb: str
    unit: str


@dataclass(frozen=True)
class WorkerJob:
    """A job for a script in another environment; `job.py` says what the script has."""

    environment: str
    script: Path
    content: Mapping[str, Any]
    """What the script's `main` is given, as JSON."""

    variables: Mapping[str, str]
    log: Path
    bars: LogProgress

    name: str = ""
    """What messages call it, if not by its environment."""

    check: Callable[[], None] = field(default=lambda: None)
    """Called now and then while it runs; raises where there is no use in going on."""


def run_job(job: WorkerJob, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run a job to its end in a folder of its own, and return its outcome: what `main` returned, or `failed` and `message`.

    Raises:
        MissingError: its environment is not installed.
        ServerError: it was killed.
    """
    path, outcome = folder.absolute() / "job.json", folder.absolute() / "outcome.json"
    # A file, not an argument: command lines are limited, and any user can read them.
    write_json(path, job.content)
    command = python_command(job.environment, str(_JOB), str(job.script), str(path), str(outcome))
    with run_worker(job.environment, command, job.variables, job.log.absolute()) as worker:
        _follow(worker, job, progress)
        if not outcome.is_file():
            raise ServerError(
                f"{job.name or job.environment} was ended before it was done; the machine may have run out of memory"
                f"{worker.exit_reason()}"
            )
    return cast("dict[str, Any]", redact_value(json.loads(outcome.read_text(encoding="utf-8"))))


def _follow(worker: Worker, job: WorkerJob, progress: Progress) -> None:
    """Report a job's progress from its log until it ends; a bar that starts anew is a further task."""
    done, total, offset, bars = 0, 0, worker.start, job.bars
    with ExitStack() as tasks, worker.log.open("rb") as log:
        advance = tasks.enter_context(progress.task(f"{worker.name}: load", 1, bars.loading))
        while True:
            # Before the log is read: what the worker wrote last is then still reported.
            ended = worker.process.poll() is not None
            job.check()
            log.seek(offset)
            new = log.read()
            # Whole lines only: half a progress bar would match as another number.
            offset += max(new.rfind(b"\r"), new.rfind(b"\n")) + 1
            for match in bars.pattern.finditer(new):
                count, of = int(match.group(1)), int(match.group(2))
                if of != total or count < done:
                    advance(0 if total else 1)
                    tasks.close()
                    done, total = 0, of
                    advance = tasks.enter_context(progress.task(f"{worker.name}: {bars.verb}", of, bars.unit))
                advance(count - done)
                done = count
            if ended:
                return
            time.sleep(_POLL_SECONDS)
