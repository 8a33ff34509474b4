"""Runs a server that must not outlive the one who started it: run as a script of its own, `guard.py GRACE COMMAND…`.

It leads the server's process group. When its standard input ends (closed on purpose, or because the starter died, by whatever
means) the group gets SIGTERM, and after GRACE seconds SIGKILL; when the server ends by itself, what it left running is killed.
Only the standard library is used: it starts in milliseconds and in any Python.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

_INTERVAL = 0.2


def main(grace: float, command: list[str]) -> None:
    """Run `command` until it ends or standard input does; never returns, as it kills its own group at the end."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a handler, as an ignored signal would stay ignored in the server
        signal.signal(number, lambda number, frame: None)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while server.poll() is None:
            if select.select([sys.stdin.fileno()], [], [], _INTERVAL)[0]:
                _end(server, grace)
                break
        else:
            sys.stdout.write(f"The server ended with {_outcome(server.returncode)}.\n")
            sys.stdout.flush()
    finally:
        os.killpg(0, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes], grace: float) -> None:
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while server.poll() is None and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
