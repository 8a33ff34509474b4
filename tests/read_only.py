"""A folder that can only be read, for one process: on any machine, as any user, without the right to mount."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.preloaded import own_python

_MODULES = ("torch._dynamo", "torch.distributed.tensor.parallel", "torchvision", "scipy.stats", "pyarrow.dataset", "pydantic")
"""What a run imports, but not transformers, which reads the hub's variables when it is imported."""

_PROGRAM = """
import errno, os, sys

folder = os.path.realpath(sys.argv.pop(1))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime"}


def refuse(event, arguments):
    if event in CHANGING or (event == "open" and (arguments[2] or 0) & WRITING):
        for path in arguments:
            if isinstance(path, (str, bytes, os.PathLike)):
                name = os.fsdecode(path)
                place = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
                if os.path.commonpath([folder, place]) == folder:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)


sys.addaudithook(refuse)
from compress.cli.main import main

main()
"""


def compress_with_read_only(folder: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that the system refuses, as of a file system mounted read-only, to change the folder."""
    command = [own_python(*_MODULES), "-c", _PROGRAM, str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
