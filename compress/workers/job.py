"""Do one job in another environment: a script, `job.py SCRIPT JOB OUTCOME`, that imports the standard library alone.

JOB is a JSON file. SCRIPT is a Python file with `main(job)`, whose result goes to the file OUTCOME as JSON, and
`describe(error, job)`: an error that ends the process goes there as its two texts, `failed` (a kind) and `message`. Neither file
imports this package: the environment has other versions of its dependencies.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any


def main(script: Path, job_file: Path, outcome: Path) -> None:
    """Do the job and write its outcome."""
    job: dict[str, Any] = json.loads(job_file.read_text(encoding="utf-8"))
    module: Any = _load(script)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The traceback still goes to the log: the outcome has only the message.
        sys.__excepthook__(kind, error, trace)
        failed, message = module.describe(error, job)
        _write(outcome, {"failed": failed, "message": message})

    # A hook, not an except: whatever ends the process is described, and nothing is caught.
    sys.excepthook = hook
    _write(outcome, module.main(job) or {})


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("worker", script)
    if spec is None or spec.loader is None:
        raise ImportError(script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _write(path: Path, outcome: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(outcome), encoding="utf-8")
    # A reader that finds the file finds all of it.
    temporary.replace(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
