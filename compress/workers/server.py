"""A runtime's server as a subprocess: start it, wait until it answers, and always end it."""

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
from compress.runtimes.exchange import AnswerError, exchange, models_of, open_http
from compress.runtimes.runtime import RunningServer
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact, secrets_known
from compress.workers.exit_reason import describe_exit, read_log

_GUARD = Path(__file__).with_name("guard.py")
_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""

_POLL_SECONDS = 0.25
"""Seconds between two health checks of a server that is loading."""

_REQUEST_SECONDS = 10
"""The timeout of a health check, and of the list of models: a server that is loading may accept a connection and not answer."""


@dataclass(frozen=True)
class Server:
    """A started server."""

    name: str
    """What messages call it."""

    process: subprocess.Popen[bytes]
    """The guard that leads the server's process group."""

    log: Path
    """Receives the server's output."""

    start: int
    """The byte of the log at which this server's output begins: earlier servers wrote to the same file."""

    def check(self) -> None:
        """Check that the server is still running.

        Raises:
            ServerError: it exited; the message holds its last log lines.
        """
        if self.process.poll() is not None:
            raise ServerError(f"{self.name} ended{self.exit_reason()}")

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready` returns True, for at most `seconds`.

        Raises:
            ServerError: the server exited, or was not ready in time; the message holds its last log lines.
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
        """Return what the server has printed so far."""
        return read_log(self.log, self.start)

    def exit_reason(self) -> str:
        """Return the end of a message on the server's exit; see `describe_exit`."""
        return describe_exit(self.read_log(), self.log)


@contextmanager
def run_server(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Generator[Server]:
    """Start a server in a process group of its own; the whole group is ended when the context ends or this process dies.

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
        _send_secrets(process)
        yield Server(name=name, process=process, log=log, start=start)
    finally:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        process.wait()
        with suppress(ProcessLookupError):  # the group is gone, unless the guard was killed
            os.killpg(process.pid, signal.SIGKILL)


def _send_secrets(process: subprocess.Popen[bytes]) -> None:
    """Send the guard the secrets to keep out of the log: by a pipe, as other users can read its command and environment."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it exited already; its log has the reason
            process.stdin.write(json.dumps(secrets_known()).encode() + b"\n")
            process.stdin.flush()


def await_service(server: Server, served: RunningServer, seconds: float) -> None:
    """Wait until a started server answers at `/health`, and check that it serves the model that it was started with.

    Raises:
        ServerError: it exited, was not ready in time, or another server answers at its port.
    """
    headers = {"Authorization": f"Bearer {served.key}"}
    with open_http(served.url, headers, 1, trust_env=False) as client:
        server.wait(lambda: _is_healthy(client), seconds)
        try:
            with exchange(client, "GET", "/v1/models", _REQUEST_SECONDS) as response:
                names = [str(row["id"]) for row in models_of(response.json())]
        except (httpx.HTTPError, AnswerError, ValueError, RecursionError) as error:
            reason = printable(redact(str(error)))
            raise ServerError(f"{served.url}: does not tell which model it serves ({reason}); run it again") from error
        if names != [served.model]:
            raise ServerError(f"{served.url} serves another model, not the server that was started; run it again")


def _is_healthy(client: httpx.Client) -> bool:
    try:
        with exchange(client, "GET", "/health", _REQUEST_SECONDS) as response:
            return httpx.codes.is_success(response.status)
    except (httpx.HTTPError, AnswerError):
        return False


def choose_port(port: int | None, name: str) -> int:
    """Return `port` if nothing listens there on loopback; for None, a free port chosen by the operating system.

    Raises:
        ServerError: the port is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ServerError(
                f"{name} cannot serve on port {port} ({error.strerror}); name another port, or leave it out to take a free one"
            ) from error
        return int(probe.getsockname()[1])
