"""Has `server.py` run a Python command: `client.py SOCKET PYTHON ARGUMENT…`. `python --version` and the like run in PYTHON."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main(path: str, python: str, arguments: list[str]) -> None:
    """Run the command, pass signals on to it, and end as it did."""
    rest = [argument for argument in arguments if argument not in ("-I", "-B", "-u")]
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-m", "-c")):
        os.execv(python, [python, *arguments])
    request = json.dumps({"arguments": arguments, "variables": dict(os.environ), "folder": os.getcwd()}).encode()  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
        status = server.recv(16)
    if not status:
        sys.exit("the server of preloaded modules ended")
    code = int(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
