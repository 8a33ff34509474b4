"""Servers: workers that answer over HTTP on a port of this machine."""

from __future__ import annotations

import socket

import httpx

from compress.errors import ServerError
from compress.runtimes.exchange import AnswerError, exchange, models_of, open_http
from compress.runtimes.runtime import RunningServer
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact
from compress.workers.worker import Worker

_REQUEST_SECONDS = 10
"""The timeout of a health check, and of the list of models: a server that is loading may accept a connection and not answer."""


def await_service(server: Worker, served: RunningServer, seconds: float) -> None:
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
        # Another program may have taken the port between its choice and the server's start: its answers would be measured.
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
            # Port 0: the system chooses a free one. It may be taken before the server binds it, which `await_service` finds out.
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ServerError(
                f"{name} cannot serve on port {port} ({error.strerror}); name another port, or leave it out to take a free one"
            ) from error
        return int(probe.getsockname()[1])
