"""Run a server that must not outlive its parent process: a script of its own, `guard.py GRACE COMMAND…`.

The guard leads the server's process group. When its standard input ends (closed on purpose, or because the parent died) the group
gets SIGTERM, and SIGKILL after GRACE seconds; when the server exits by itself, its remaining children are killed. The server's
output passes through the guard to the log, line by line, with secrets redacted: those that the first line of standard input lists
as JSON, and those of the environment. Only the standard library is imported, so that it starts in milliseconds in any Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.2
"""How long the exit of the server may go unnoticed."""

_CHUNK_BYTES = 1 << 16
"""Bytes of one read; also the length from which on an unfinished line is written."""


class Log:
    """Copies a pipe to standard output, line by line, redacted."""

    def __init__(self, pipe: int, redact: Callable[[str], str]) -> None:
        # The loop below watches standard input as well, and must not wait for a silent server.
        os.set_blocking(pipe, False)
        self.pipe = pipe
        self._redact = redact
        self._unfinished = b""

    def take(self) -> bool:
        """Copy what is available; return whether there was anything."""
        try:
            content = os.read(self.pipe, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        # Whole lines, as a secret may be split between two reads; progress bars end theirs with a carriage return.
        end = max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        if end:
            self.write(self._unfinished + content[:end])
            self._unfinished = content[end:]
        else:
            self._unfinished += content
        if len(self._unfinished) > _CHUNK_BYTES:
            self.write(self._unfinished)
            self._unfinished = b""
        return bool(content)

    def finish(self) -> None:
        """Write the last line, if it is unfinished."""
        if self._unfinished:
            self.write(self._unfinished + b"\n")
        self._unfinished = b""

    def write(self, content: bytes) -> None:
        """Write lines, redacted."""
        remaining = self._redact(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        with suppress(OSError):  # a full disk must not end the server in the middle of an answer
            while remaining:
                remaining = remaining[os.write(1, remaining) :]


def main(grace: float, command: list[str]) -> None:
    """Run `command` until it exits or standard input ends; never returns, as it kills its own group at the end."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a handler, as an ignored signal would stay ignored in the server
        signal.signal(number, lambda number, frame: None)
    try:
        with open(0, "rb", buffering=0, closefd=False) as stdin:
            line = stdin.readline()
        redact = _redaction(json.loads(line) if line else [])
        pipe, output = os.pipe()
        # In the guard's own process group: one signal reaches the server and all its children.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        # Or the pipe would never end: it ends when the last writer has closed it.
        os.close(output)
        log = Log(pipe, redact)
        _follow(server, log, grace)
        while log.take():
            pass
        log.finish()
        if server.returncode is not None:
            log.write(f"The server ended with {_exit_status(server.returncode)}.\n".encode())
    finally:
        # Engine processes may survive their parent; the guard is in the group and ends with it.
        os.killpg(0, signal.SIGKILL)


def _follow(server: subprocess.Popen[bytes], log: Log, grace: float) -> None:
    """Copy the server's output until it exits, or until the grace period after SIGTERM is over."""
    deadline: float | None = None
    while server.poll() is None and (deadline is None or time.monotonic() < deadline):
        ready = select.select([log.pipe] if deadline else [log.pipe, 0], [], [], _POLL_SECONDS)[0]
        if log.pipe in ready and not log.take():
            time.sleep(_POLL_SECONDS)  # it has closed its output and still runs
        if 0 in ready and not deadline:
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + grace


def _redaction(secrets: list[str]) -> Callable[[str], str]:
    """Return the function that redacts secrets: the package's own, loaded by its path, as this Python may lack the package."""
    path = Path(__file__).resolve().parents[1] / "untrusted" / "redaction.py"
    spec = importlib.util.spec_from_file_location("redaction", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for secret in secrets:
        module.remember_secret(secret)
    return module.redact


def _exit_status(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
