"""Why a process exited, by its log: the line with the root error, rather than the errors that followed from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.runtimes.vllm.memory_fallback import memory_fault
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact

_TAIL_LINES = 20
"""Log lines in a message where no reason was found: a traceback's last frames fit."""

_TAIL_LINES_WITH_REASON = 6
"""Log lines in a message where the reason is known: the rest is in the log."""

_SHOWN_CHARACTERS = 300
"""Characters of a reason in a message."""

_REASON_CHARACTERS = 4000
"""Characters of a reason that patterns are matched against, and of each log line in a message."""

_PREFIX = re.compile(r"^\s*(?:\([^()]*\bpid=\d+\)\s*)?(?:(?:ERROR|CRITICAL)\s+\S+ \S+ \[[^\]]*\]\s*)?(?:E\s+)?")
"""vLLM's log prefix: process, level, time and source line."""

# Libraries log caught exceptions at these levels: such a line did not end the process.
_HARMLESS = re.compile(r"\b(?:DEBUG|INFO|WARNING|Warning)\b")
_NAMED = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)")
_BARE = re.compile(r"(?:[\w.]+\.)?(\w*(?:Error|Exception))")
_USAGE = re.compile(r"\S+(?: \w+)*: error: (.+)")
_VALIDATION = re.compile(r"\d+ validation errors? for \w+")
_TYPE_SUFFIX = re.compile(r"\s*\[type=\w+, input_value=.*")
# vLLM's API server reports that its engine died; the engine's own error stands further up.
_VAGUE = re.compile(
    r"see (?:the )?(?:root cause|stack trace|above)|Engine core initialization failed|worker process died", re.IGNORECASE
)


def read_log(log: Path, start: int) -> str:
    """Return a log from byte `start` on; of a long one, the first and the last half of what the limit allows."""
    limit = limits().log_bytes
    with log.open("rb") as file:
        size = file.seek(0, 2) - start
        file.seek(start)
        if size <= limit:
            return file.read(limit).decode(errors="replace")
        # Both ends: the root error is often early (a worker that died), its consequences last.
        first = file.read(limit // 2)
        file.seek(start + size - limit // 2)
        return (first + b"\n[...]\n" + file.read(limit // 2)).decode(errors="replace")


def reason_of(log: str) -> str | None:
    """Return the line of a log that says why its process exited: that memory ran out, or the first named error.

    Errors that only refer to others ("see stack trace above") count only where there is no other.
    """
    # Before any other error: when memory runs out, what follows is noise.
    if (memory := memory_fault(log)) is not None:
        return printable(redact(_PREFIX.sub("", memory)[:_REASON_CHARACTERS]))
    errors = list(_errors([line.rstrip() for line in log.splitlines() if line.strip()]))
    specific = [error for error in errors if not _VAGUE.search(error)]
    return next((printable(redact(error.strip()))[:_REASON_CHARACTERS] for error in [*specific, *errors]), None)


def describe_exit(log: str, path: Path | None) -> str:
    """Return the end of a message on an exit: after a colon the reason, where one is known, and then the log's last lines."""
    reason = reason_of(log)
    lines = [printable(redact(line.rstrip())) for line in log.splitlines() if line.strip()]
    tail = "\n".join(f"  {line[:_REASON_CHARACTERS]}" for line in lines[-(_TAIL_LINES_WITH_REASON if reason else _TAIL_LINES) :])
    return f"{f': {shorten(reason)}' if reason else '.'}\nThe last lines{'' if path is None else f' of {path}'}:\n{tail}"


def _errors(lines: Sequence[str]) -> Iterator[str]:
    """Yield the error of each line that names one: a validation error's text follows it, a bare error's source line precedes it."""
    for index, line in enumerate(lines):
        plain = _PREFIX.sub("", line)
        if (usage := _USAGE.fullmatch(plain)) is not None:
            yield usage.group(1)
        if (bare := _BARE.fullmatch(plain)) is not None:
            above = [_PREFIX.sub("", row) for row in lines[max(0, index - 2) : index]]
            yield f"{bare.group(1)}: {next((row.strip() for row in reversed(above) if row.strip(' ^~')), 'without words')}"
        named = _NAMED.match(plain)
        if named is None or _HARMLESS.search(line):
            continue
        error = f"{named.group(1)}: {named.group(2)}"
        if _VALIDATION.search(named.group(2)):
            below = [_TYPE_SUFFIX.sub("", _PREFIX.sub("", row)) for row in lines[index + 1 : index + 3]]
            error = next(
                (row.removeprefix("Value error, ") for row in below if row.startswith("Value error, ")), " ".join(below[:2])
            )
        yield error


def shorten(reason: str) -> str:
    """Return a reason, cut to the length of a message."""
    return reason if len(reason) <= _SHOWN_CHARACTERS else reason[: _SHOWN_CHARACTERS - 1] + "…"
