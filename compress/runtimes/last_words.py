"""Why a process ended, by what it had printed: the line that says it, before all that followed from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.limits import limits
from compress.redaction import redact
from compress.runtimes.vllm_ladder import memory_fault
from compress.untrusted import printable

_SHOWN_LINES = 20
_FEW_LINES = 6
"""Lines that are shown where the reason is known: the rest is in the log."""
_LONGEST = 300
_MOST = 4000
"""Characters of a reason that are looked into; `_LONGEST` are shown."""
_PREFIX = re.compile(r"^\s*(?:\([^()]*\bpid=\d+\)\s*)?(?:(?:ERROR|CRITICAL)\s+\S+ \S+ \[[^\]]*\]\s*)?(?:E\s+)?")
"""What vLLM writes before a line: which of its processes, how bad, when, and where in its code."""
_HARMLESS = re.compile(r"\b(?:DEBUG|INFO|WARNING|Warning)\b")
_NAMED = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)")
_BARE = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception))")
_COMMAND = re.compile(r"\S+(?: \w+)*: error: (.+)")
_MANY = re.compile(r"\d+ validation errors? for \w+")
_TYPE = re.compile(r"\s*\[type=\w+, input_value=.*")
_VAGUE = re.compile(
    r"see (?:the )?(?:root cause|stack trace|above)|Engine core initialization failed|worker process died", re.IGNORECASE
)


def read_log(log: Path, start: int) -> str:
    """Return what a log holds from a byte on; of a long one the first half and the last of what the limit allows."""
    most = limits().log_bytes
    with log.open("rb") as file:
        size = file.seek(0, 2) - start
        file.seek(start)
        if size <= most:
            return file.read(most).decode(errors="replace")
        first = file.read(most // 2)
        file.seek(start + size - most // 2)
        return (first + b"\n[...]\n" + file.read(most // 2)).decode(errors="replace")


def reason_of(words: str) -> str | None:
    """Return the line of a log that says why its process ended: that memory ran out, or the first error that is named.

    Of errors that only point to others, the first counts where there is none else.
    """
    if (memory := memory_fault(words)) is not None:
        return printable(redact(_PREFIX.sub("", memory)[:_MOST]))
    found = list(_errors([line.rstrip() for line in words.splitlines() if line.strip()]))
    plain = [error for error in found if not _VAGUE.search(error)]
    return next((printable(redact(error.strip()))[:_MOST] for error in [*plain, *found]), None)


def describe_end(words: str, log: Path | None) -> str:
    """Return what to say of an end: after a colon the reason, where one is known, and then the log's last lines."""
    reason = reason_of(words)
    lines = [printable(redact(line.rstrip())) for line in words.splitlines() if line.strip()]
    tail = "\n".join(f"  {line[:_MOST]}" for line in lines[-(_FEW_LINES if reason else _SHOWN_LINES) :])
    return f"{f': {shorten(reason)}' if reason else '.'}\nThe last lines{'' if log is None else f' of {log}'}:\n{tail}"


def _errors(lines: Sequence[str]) -> Iterator[str]:
    """Give what each line says that names an error; of a validation's, the line below; of one without words, the code above."""
    for place, line in enumerate(lines):
        plain = _PREFIX.sub("", line)
        if (wrong := _COMMAND.fullmatch(plain)) is not None:
            yield wrong.group(1)
        if (bare := _BARE.fullmatch(plain)) is not None:
            above = [_PREFIX.sub("", row) for row in lines[max(0, place - 2) : place]]
            yield f"{bare.group(1)}: {next((row.strip() for row in reversed(above) if row.strip(' ^~')), 'without words')}"
        found = _NAMED.match(plain)
        if found is None or _HARMLESS.search(line):
            continue
        words = f"{found.group(1)}: {found.group(2)}"
        if _MANY.search(found.group(2)):
            below = [_TYPE.sub("", _PREFIX.sub("", row)) for row in lines[place + 1 : place + 3]]
            words = next(
                (row.removeprefix("Value error, ") for row in below if row.startswith("Value error, ")), " ".join(below[:2])
            )
        yield words


def shorten(reason: str) -> str:
    """Return a reason as it is shown."""
    return reason if len(reason) <= _LONGEST else reason[: _LONGEST - 1] + "…"
