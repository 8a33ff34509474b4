"""Tries foreign chat templates and patterns in a process of its own, with limits, before this one takes them up.

A template is a program and a regular expression may take exponential time: neither can be stopped within a process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from compress.errors import CheckpointError
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable
from compress.untrusted.trial_worker import NO_MEMORY

_WORKER = Path(__file__).with_name("trial_worker.py")
_PATIENCE = 20
"""How many times its CPU time a trial may take by the clock, on a machine that has other work: only one that sleeps meets it."""


def try_template(template: object, conversations: Sequence[object], tokens: Mapping[str, object], where: str) -> None:
    """Write conversations with a chat template, or each of several by name; raises where that exceeds a limit.

    A template that does not work passes: what is wrong with it is told by who uses it. `tokens` are the special tokens that
    templates can name; `where` is the folder that an error names.

    Raises:
        CheckpointError: it is no text, or too long, slow or large.
    """
    templates = list(cast("dict[str, object]", template).values()) if isinstance(template, dict) else [template]
    for text in templates:
        if not isinstance(text, str):
            raise CheckpointError(f"{printable(where)}: its chat template is no text; correct it, or fetch it again")
        if len(text) > limits().template_bytes:
            raise CheckpointError(
                f"{printable(where)}: its chat template has {len(text):,} bytes ({limits().set_by('template_bytes')})"
            )
    # Texts alone go to the other process: templates name tokens by their text.
    plain = {name: token for name, token in tokens.items() if isinstance(token, str)}
    job = {"templates": templates, "conversations": list(conversations), "tokens": plain}
    _tell(job, f"{printable(where)}: its chat template", "do not use it")


def try_patterns(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Match regular expressions with names, as is done afterwards; raises where that exceeds a limit.

    Raises:
        CheckpointError: it does.
    """
    job = {"patterns": sorted(set(patterns)), "names": sorted(set(names))}
    if job["patterns"]:
        _tell(job, f"{printable(where)}: a pattern in it", "write it otherwise")


def _tell(job: Mapping[str, Any], what: str, remedy: str) -> None:
    met = _limit_met(json.dumps({**job, "seconds": limits().trial_seconds, "bytes": limits().trial_bytes}))
    if met:
        took = "takes too long" if met == "trial_seconds" else "takes too much memory"
        raise CheckpointError(f"{what} {took} ({limits().set_by(met)}); {remedy}")


@lru_cache(maxsize=64)
def _limit_met(job: str) -> str:
    """Return the limit that a job meets, empty where none."""
    # -I: neither the working directory nor PYTHONPATH may put another `json` in its way.
    command = [sys.executable, "-I", str(_WORKER)]
    patience = _PATIENCE * limits().trial_seconds
    try:
        done = subprocess.run(command, input=job.encode(), capture_output=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return "trial_seconds"
    # SIGXCPU at the soft limit, SIGKILL at the hard one, a second later.
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "trial_seconds"
    # With little memory C code may fail before Python can raise MemoryError.
    return "trial_bytes" if done.returncode in (NO_MEMORY, -signal.SIGSEGV, -signal.SIGABRT) else ""
