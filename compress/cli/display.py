"""What people see while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.text import Text

from compress.report.figures import duration, singular, size
from compress.report.tabular import Table
from compress.report.terminal import aligned_lines, as_renderables
from compress.untrusted.reading import printable

# For logs of hours: a line every ten seconds shows life without filling them.
_SECONDS_BETWEEN_LINES = 10.0

_ALREADY_THERE = 0.1
"""Seconds within which work that was done before is counted: a speed would be that of reading it."""

_TELLING = 20
"""From one part of so many on, the time that is left is guessed: the first batch of a server is slow."""


class PipedConsole(Console):
    """A console that says when whoever reads it has gone; rich's own ends the process there, with the exit code of a verdict."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line.

        Raises:
            BrokenPipeError: always; this is called while one is handled.
        """
        raise


class _Count(ProgressColumn):
    """How many of all units are finished."""

    def render(self, task: BarTask) -> Text:
        """Return both numbers."""
        return Text(share_of(int(task.completed), int(task.total or 0), task.fields["unit"]), style="progress.download")


class _Rate(ProgressColumn):
    """Units finished per second."""

    def render(self, task: BarTask) -> Text:
        """Return the rate, or nothing while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(rate(speed, task.fields["unit"]) if speed else "", style="progress.data.speed")


def share_of(done: int, total: int, unit: str) -> str:
    """Return how many of all units are finished: 3/64 prompts, 1/1 server, 1.2 MB of 3.9 MB."""
    if unit == "B":
        return f"{size(done)} of {size(total)}"
    return f"{done:,}/{total:,} {singular(unit) if total == 1 else unit}"


def rate(speed: float, unit: str) -> str:
    """Return a speed with three digits that matter."""
    if unit == "B":
        return f"{size(speed)}/s"
    return f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.3g} {unit}/s"


def print_table(console: Console, table: Table) -> None:
    """Print a table: in columns where there is room for them or nobody's terminal to wrap them, otherwise row by row."""
    if not console.is_terminal:
        for line in aligned_lines(table):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    for part in as_renderables(table, console.width):
        console.print(part, highlight=False, soft_wrap=False)


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
        columns = (TextColumn("      {task.description}"), BarColumn(), _Count(), _Rate(), TimeRemainingColumn())
        with Bars(*columns, console=self._console, transient=True) as bars:
            bar = bars.add_task(name, total=total, unit=unit)
            done = 0

            def count(units: int) -> None:
                nonlocal done
                done = min(done + units, total)  # work that is done again, such as a piece fetched anew, is not more work
                bars.update(bar, completed=done)

            yield count

    def _lines(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        done, began = 0, time.monotonic()
        last = began

        def count(units: int) -> None:
            nonlocal done, last
            done = min(done + units, total)
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES and done < total:
                last = now
                speed = done / (now - began)
                left = f", {duration((total - done) / speed)} left" if done * _TELLING >= total else ""
                told = f"{share_of(done, total, unit)}, {rate(speed, unit)}{left}"
                self._console.print(f"      {name}: {told}", highlight=False, markup=False)

        yield count
        took = time.monotonic() - began
        speed = f", {rate(done / took, unit)}" if took > _ALREADY_THERE and done > 1 else ""
        self._console.print(
            f"      {name}: {share_of(done, total, unit)} in {duration(took)}{speed}", highlight=False, markup=False
        )
