"""Runs a server that must not outlive the one who started it: run as a script of its own, `guard.py GRACE COMMAND…`.

It leads the server's process group. When its standard input ends (closed on purpose, or because the starter died, by whatever
means) the group gets SIGTERM, and after GRACE seconds SIGKILL; when the server ends by itself, what it left running is killed.
What the server prints goes to the log through it, line by line, without secrets: those that the first line of standard input
lists, as JSON, and those of the environment. Only the standard library is used: it starts in milliseconds and in any Python.
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

_INTERVAL = 0.2
_PORTION = 1 << 16
"""Bytes of one read, and of a line that is passed on though it has not ended."""


class Log:
    """Passes on what comes from a pipe to standard output, line by line."""

    def __init__(self, pipe: int, redact: Callable[[str], str]) -> None:
        os.set_blocking(pipe, False)
        self.pipe = pipe
        self._redact = redact
        self._rest = b""

    def take(self) -> bool:
        """Pass on what is there; return whether there was anything."""
        try:
            content = os.read(self.pipe, _PORTION)
        except BlockingIOError:
            return False
        end = max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        if end:
            self.write(self._rest + content[:end])
            self._rest = content[end:]
        else:
            self._rest += content
        if len(self._rest) > _PORTION:
            self.write(self._rest)
            self._rest = b""
        return bool(content)

    def finish(self) -> None:
        """End a line that has not ended."""
        if self._rest:
            self.write(self._rest + b"\n")
        self._rest = b""

    def write(self, content: bytes) -> None:
        """Write lines without secrets."""
        left = self._redact(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
        with suppress(OSError):  # a full disk must not end the server in the middle of an answer
            while left:
                left = left[os.write(1, left) :]


def main(grace: float, command: list[str]) -> None:
    """Run `command` until it ends or standard input does; never returns, as it kills its own group at the end."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a handler, as an ignored signal would stay ignored in the server
        signal.signal(number, lambda number, frame: None)
    try:
        with open(0, "rb", buffering=0, closefd=False) as told:
            line = told.readline()
        redact = _redaction(json.loads(line) if line else [])
        pipe, its = os.pipe()
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=its, stderr=its)
        os.close(its)
        log = Log(pipe, redact)
        _follow(server, log, grace)
        while log.take():
            pass
        log.finish()
        if server.returncode is not None:
            log.write(f"The server ended with {_outcome(server.returncode)}.\n".encode())
    finally:
        os.killpg(0, signal.SIGKILL)


def _follow(server: subprocess.Popen[bytes], log: Log, grace: float) -> None:
    """Pass on what the server prints until it ends, or until it is to end and the grace is over."""
    deadline: float | None = None
    while server.poll() is None and (deadline is None or time.monotonic() < deadline):
        ready = select.select([log.pipe] if deadline else [log.pipe, 0], [], [], _INTERVAL)[0]
        if log.pipe in ready and not log.take():
            time.sleep(_INTERVAL)  # it has closed its output and still runs
        if 0 in ready and not deadline:
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + grace


def _redaction(secrets: list[str]) -> Callable[[str], str]:
    """Return what takes secrets out of a text: the package's own, loaded by itself, as this Python may not find the package."""
    path = Path(__file__).resolve().parents[1] / "redaction.py"
    spec = importlib.util.spec_from_file_location("redaction", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for secret in secrets:
        module.remember_secret(secret)
    return module.redact


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
