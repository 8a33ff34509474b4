"""The process that `harness.py` starts: imports everything once, then forks for every line on its standard input."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

_IN_OPEN, _IN_NONBLOCK = 0x20, 0o4000
_EVENT = struct.Struct("iIII")
_HARD_SECONDS, _HARD_BYTES = 60, 4_000_000_000
"""Past these a case is ended by the system, so that a bad one costs the machine no more."""


def command(arguments: list[str]) -> NoReturn:
    """Run one command of the command line."""
    from compress.cli.main import main

    main(arguments)


def _memory(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class _Watch:
    """Tells which files of a folder were opened since it was asked last, by whatever process (inotify)."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.folder = folder
        self.descriptor = libc.inotify_init1(_IN_NONBLOCK)
        if self.descriptor < 0 or libc.inotify_add_watch(self.descriptor, os.fsencode(folder), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify", str(folder))

    def opened(self) -> list[str]:
        """Return the files that were opened."""
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        names: set[str] = set()
        while data:
            size = _EVENT.unpack_from(data)[3]
            names.add(data[_EVENT.size : _EVENT.size + size].rstrip(b"\0").decode())
            data = data[_EVENT.size + size :]
        return sorted(str(self.folder / name) for name in names if name)


def _run(job: dict[str, Any], streams: dict[int, str], baseline: str, record: str) -> NoReturn:
    Path(baseline).write_text(str(_memory(os.getpid(), "VmRSS")), encoding="ascii")
    for descriptor, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (_HARD_SECONDS, _HARD_SECONDS))
    size = _memory(os.getpid(), "VmSize") + _HARD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    opened: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))

    code = 0
    try:
        module, _, name = str(job["function"]).partition(":")
        function = getattr(importlib.import_module(module), name)
        sys.addaudithook(note)
        result = function(*job["arguments"])
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, the outcome is to show it
        traceback.print_exc()
        code = 70
    finally:
        found = sorted(opened)
        sys.stdout.flush()
        sys.stderr.flush()
        Path(record).write_text(json.dumps(found), encoding="utf-8", errors="surrogateescape")
        os._exit(code)


def _serve(job: dict[str, Any], watch: _Watch) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("stdout", "stderr", "opened", "before")]
        for path in paths:
            Path(path).touch()
        watch.opened()
        child = os.fork()
        if child == 0:
            _run(job, {1: paths[0], 2: paths[1]}, paths[3], paths[2])
        _, status, usage = os.wait4(child, 0)
        stdout, stderr, opened, before = (Path(path).read_text(encoding="utf-8", errors="replace") for path in paths)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": stdout,
        "stderr": stderr,
        "seconds": usage.ru_utime + usage.ru_stime,
        "grown": max(0, usage.ru_maxrss * 1024 - int(before)),
        "opened": [path for path in json.loads(opened or "[]") if not path.startswith(folder)],
        "decoys": watch.opened(),
    }


def main() -> None:
    """Serve until standard input ends."""
    watch = _Watch(Path(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all the pages that they share
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        replies.write(json.dumps(_serve(json.loads(line), watch)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
