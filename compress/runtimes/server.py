"""A runtime's server as a subprocess: started, watched until it serves, and ended in every case."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from compress.errors import ServerError, StoreError
from compress.redaction import redact, secrets_known
from compress.runtimes.exchange import AnswerError, exchange, models_of, open_http
from compress.runtimes.last_words import describe_end, read_log
from compress.runtimes.runtime import Served
from compress.untrusted import printable

_GUARD = Path(__file__).with_name("guard.py")
_GRACE = 10.0
"""Seconds a server has to end by itself."""
_INTERVAL = 0.25
_SECONDS = 10


@dataclass(frozen=True)
class Server:
    """A started server; `name` says in messages what it is, `log` takes all that it prints, from byte `start` on."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    start: int

    def check(self) -> None:
        """See that it is still running.

        Raises:
            ServerError: it ended; the message holds its last log lines.
        """
        if self.process.poll() is not None:
            raise ServerError(f"{self.name} ended{self.last_words()}")

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready` says that it serves.

        Raises:
            ServerError: it ended before, or was not ready after so many seconds; the message holds its last log lines.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended while it was loading{self.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer within {seconds:g} seconds; raise startup_seconds if the log shows that it is "
                    f"still loading{self.last_words()}"
                )
            time.sleep(_INTERVAL)

    def words(self) -> str:
        """Return all that it has printed."""
        return read_log(self.log, self.start)

    def last_words(self) -> str:
        """Return what the log tells of an end, to be put after words that say that it came: see `describe_end`."""
        return describe_end(self.words(), self.log)


@contextmanager
def run_server(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Generator[Server]:
    """Start a server in a process group of its own; the whole group is ended when the context is left or this process dies.

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
            process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(_GRACE), *command],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise ServerError(f"{name} cannot be started ({error}): {command[0]}") from error
    try:
        _tell_secrets(process)
        yield Server(name=name, process=process, log=log, start=start)
    finally:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        process.wait()
        with suppress(ProcessLookupError):  # nothing is left, unless the guard was killed
            os.killpg(process.pid, signal.SIGKILL)


def _tell_secrets(process: subprocess.Popen[bytes]) -> None:
    """Tell the guard what to keep out of the log; not by its command or environment, which others can read."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended already, which its log tells
            process.stdin.write(json.dumps(secrets_known()).encode() + b"\n")
            process.stdin.flush()


def await_service(server: Server, served: Served, seconds: float) -> None:
    """Wait until a started server answers at `/health`, and see that it serves the model that it was started with.

    Raises:
        ServerError: it ended before, was not ready after so many seconds, or serves something else.
    """
    headers = {"Authorization": f"Bearer {served.key}"}
    with open_http(served.url, headers, 1, trust_env=False) as client:
        server.wait(lambda: _is_healthy(client), seconds)
        try:
            with exchange(client, "GET", "/v1/models", _SECONDS) as answer:
                names = [str(row["id"]) for row in models_of(answer.json())]
        except (httpx.HTTPError, AnswerError, ValueError, RecursionError) as error:
            words = printable(redact(str(error)))
            raise ServerError(f"{served.url}: does not tell which model it serves ({words}); run it again") from error
        if names != [served.model]:
            raise ServerError(f"{served.url} serves another model, not the server that was started; run it again")


def _is_healthy(client: httpx.Client) -> bool:
    try:
        with exchange(client, "GET", "/health", _SECONDS) as answer:
            return httpx.codes.is_success(answer.status)
    except (httpx.HTTPError, AnswerError):
        return False


def choose_port(wanted: int | None, name: str) -> int:
    """Return `wanted` if nothing listens there on loopback, or a free port of the system's choice.

    Raises:
        ServerError: the wanted port is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise ServerError(
                f"{name} cannot serve on port {wanted} ({error.strerror}); name another port, or leave it out to take a free one"
            ) from error
        return int(probe.getsockname()[1])
