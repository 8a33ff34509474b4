"""Runs Python commands in forks of a process that has imported their heavy modules: `server.py SOCKET MODULE…`, of any environment.

Most of the time of a tiny model in vLLM, llm-compressor or a harness is the import of what runs it. A command runs as it would in a
new interpreter: with its arguments, environment variables, working folder, standard streams and exit status, in a process group of
its own. `client.py` stands in for the environment's `python` and asks for it. The server ends with its standard input.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

_LENGTH = 8
"""Bytes of a request's length, which its file descriptors come with."""


def main(path: str, modules: list[str]) -> None:
    """Serve until standard input ends; in the fork of a command, run it."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all the pages that they share
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = _Server(listener).serve()
    if command is not None:
        try:
            _run(command)
        except SystemExit as error:
            if error.code is None or isinstance(error.code, int):
                _end(error.code or 0)
            raise
        _end(0)


class _Server:
    """Forks commands, passes signals on to them, and sends back how they ended."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.commands: dict[int, socket.socket] = {}
        self.woken, wake = os.pipe()
        for end in (self.woken, wake):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(wake)

    def serve(self) -> dict[str, Any] | None:
        """Return the command in its fork, None in the server once standard input has ended."""
        while True:
            clients = {client.fileno(): pid for pid, client in self.commands.items()}
            ready = select.select([0, self.listener, self.woken, *clients], [], [])[0]
            if self.woken in ready:
                os.read(self.woken, 1 << 12)
                self._collect()
            for number, pid in clients.items():
                if number in ready and pid in self.commands:
                    self._pass_on(pid)
            if 0 in ready and not os.read(0, 1 << 12):
                for pid in self.commands:
                    _kill_group(pid, signal.SIGKILL)
                return None
            if self.listener in ready and (command := self._fork()) is not None:
                return command

    def _fork(self) -> dict[str, Any] | None:
        client, _ = self.listener.accept()
        head, descriptors, _, _ = socket.recv_fds(client, _LENGTH, 3)
        request = b""
        while len(request) < int.from_bytes(head, "big"):
            request += client.recv(1 << 16)
        pid = os.fork()
        if pid:
            self.commands[pid] = client
            for descriptor in descriptors:
                os.close(descriptor)
            return None
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (self.listener, client, *self.commands.values()):
            other.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return json.loads(request)

    def _pass_on(self, pid: int) -> None:
        """Pass a signal on to a command; kill it when its client is gone."""
        content = b""
        with suppress(ConnectionError):
            content = self.commands[pid].recv(1)
        if content and content[0] == signal.SIGINT:  # a test sends it to one process, the guard's go to a group
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        else:
            _kill_group(pid, content[0] if content else signal.SIGKILL)
        if not content:
            self.commands.pop(pid).close()

    def _collect(self) -> None:
        """Send back the exit statuses of the commands that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            _kill_group(pid, signal.SIGKILL)
            if client := self.commands.pop(pid, None):
                with suppress(OSError):
                    client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                client.close()


def _kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _run(command: dict[str, Any]) -> None:
    """Run `-m module …`, `-c code …` or `script …` as the interpreter does, options such as -I before it."""
    os.environ.clear()
    os.environ.update(command["variables"])
    os.chdir(command["folder"])
    # A child that is spawned imports everything anew; a fork of this process has it.
    forking = multiprocessing.get_context("fork")

    def context(_: str | None = None) -> object:
        return forking

    setattr(multiprocessing, "get_context", context)  # noqa: B010 - the function's type has overloads
    arguments: list[str] = command["arguments"]
    is_isolated = False
    while arguments[0] in ("-I", "-B", "-u"):
        is_isolated |= arguments.pop(0) == "-I"
    kind = arguments.pop(0) if arguments[0] in ("-m", "-c") else ""
    sys.argv = arguments
    if not is_isolated:
        first = command["folder"] if kind else os.path.dirname(os.path.abspath(arguments[0]))  # noqa: PTH100, PTH120
        sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, sys.argv[0] = arguments[0], kind
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _end(code: int) -> NoReturn:
    """End as the interpreter does, without freeing the preloaded modules: a fork would copy them for that."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
