"""What people see while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.text import Text

from compress.untrusted import printable

_SECONDS_BETWEEN_LINES = 10.0


class _Rate(ProgressColumn):
    """Units finished per second."""

    def render(self, task: BarTask) -> Text:
        """Return the rate, or nothing while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{rate(speed)} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


def rate(speed: float) -> str:
    """Return a speed with three digits that matter."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def duration(seconds: float) -> str:
    """Return a time the way people say it: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


class Display:
    """Shows a run's steps and their progress on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step_started(self, name: str, position: int, count: int) -> None:
        """Head the lines that follow with the step's name."""
        self._console.print(f"[bold]\\[{position}/{count}] {name}[/bold]", highlight=False)

    def step_finished(self, name: str, seconds: float, *, cached: bool) -> None:
        """Say how the step came by its output."""
        del name
        self._console.print("      cached" if cached else f"      done in {duration(seconds)}", style="dim", highlight=False)

    def warn(self, message: str) -> None:
        """Show a warning."""
        self._console.print(f"warning: {printable(message)}", style="yellow", highlight=False, markup=False)

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """Show counted work: how far, how fast, how long still."""
        if not self._console.is_terminal:
            yield from self._lines(name, total, unit)
            return
        columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Bars(*columns, console=self._console, transient=True) as bars:
            bar = bars.add_task(name, total=total, unit=unit)
            yield lambda units: bars.advance(bar, units)

    def _lines(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        done, began = 0, time.monotonic()
        last = began

        def count(units: int) -> None:
            nonlocal done, last
            done += units
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES and done < total:
                last = now
                speed = done / (now - began)
                left = duration((total - done) / speed) if speed else "unknown"
                self._console.print(f"      {name}: {done}/{total} {unit}, {rate(speed)} {unit}/s, {left} left", highlight=False)

        yield count
        took = time.monotonic() - began
        speed = f", {rate(done / took)} {unit}/s" if took > 0 and done > 1 else ""
        self._console.print(f"      {name}: {done}/{total} {unit} in {duration(took)}{speed}", highlight=False)
