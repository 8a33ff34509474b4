"""A run's own record of what happened when: one JSON object per line in `events.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from compress.files import disk_errors
from compress.interrupts import check as check_interrupts
from compress.progress import Progress
from compress.untrusted.redaction import redact, redact_value

# A decoding loop reports every token: a line for each would make the log larger than the answers.
_SECONDS_BETWEEN = 1.0


class Watcher(Progress, Protocol):
    """Progress that also receives the steps of a run."""

    def step_started(self, name: str, position: int, count: int) -> None:
        """Say that step `position` of `count` (from 1) began."""
        ...

    def step_finished(self, name: str, seconds: float, *, cached: bool) -> None:
        """Say that a step's output is there."""
        ...


class EventLog:
    """Writes what happens to `events.jsonl` and passes it on to whoever watches."""

    def __init__(self, path: Path, watcher: Watcher) -> None:
        self._path = path
        self._watcher = watcher
        self.warnings: list[str] = []
        self._collected: list[str] = []

    def write(self, event: str, **fields: object) -> None:
        """Append one event with its time; secrets are redacted."""
        # Through JSON first: paths and tuples become plain values, which redaction can walk.
        content = json.loads(json.dumps(fields, default=str))
        about = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line = json.dumps(about | redact_value(content))
        # Opened for each event: what a killed run has written is on disk, and the file can be followed.
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def step_started(self, name: str, position: int, count: int) -> None:
        """Record that a step began."""
        check_interrupts()
        self.write("step-started", step=name, position=position, count=count)
        self._watcher.step_started(name, position, count)

    def step_finished(self, name: str, seconds: float, *, cached: bool) -> None:
        """Record that a step's output is there."""
        check_interrupts()
        self.write("step-finished", step=name, seconds=round(seconds, 3), cached=cached)
        self._watcher.step_finished(name, seconds, cached=cached)

    def warn(self, message: str) -> None:
        """Record a warning; the report repeats each once."""
        message = redact(message)
        # A cached step repeats its warnings in every run, and several steps may give the same one.
        if message not in self.warnings:
            self.warnings.append(message)
        self._collected.append(message)
        self.write("warning", message=message)
        self._watcher.warn(message)

    def say(self, message: str) -> None:
        """Show something that only concerns this moment; the report does not repeat it."""
        message = redact(message)
        self.write("message", message=message)
        self._watcher.warn(message)

    @contextmanager
    def collecting(self, warnings: list[str]) -> Generator[None]:
        """Note the warnings given while the block runs in `warnings` too."""
        self._collected = warnings
        try:
            yield
        finally:
            self._collected = []

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """Record how counted work goes on, at most once a second."""
        done, last = 0, time.monotonic()
        with self._watcher.task(name, total, unit) as advance:

            def count(units: int) -> None:
                nonlocal done, last
                check_interrupts()
                done = min(done + units, total)
                advance(units)
                if time.monotonic() - last >= _SECONDS_BETWEEN:
                    last = time.monotonic()
                    self.write("progress", task=name, done=done, total=total, unit=unit)

            yield count
        self.write("progress", task=name, done=done, total=total, unit=unit)
