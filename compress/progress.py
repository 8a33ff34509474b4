"""How long work tells where it stands; what is done with that is the caller's business."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives what a step says of itself while it runs."""

    def task(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a counted piece of work; the function given back is called with how many units were finished."""
        ...

    def warn(self, message: str) -> None:
        """Say something the user should know, though the work goes on."""
        ...


class Silent:
    """Progress that nobody watches."""

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """Accept the counts and drop them."""
        del name, total, unit
        yield lambda count: None

    def warn(self, message: str) -> None:
        """Drop the message."""
        del message
