"""Ctrl-C and SIGTERM end a run for certain, even where the exception they raise is swallowed on its way."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

_asked: list[int] = []


def install() -> None:
    """Take SIGINT and SIGTERM as a wish to stop; call from the main thread of a process that is this program's own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def check() -> None:
    """Stop here if a stop was asked for before: an exception raised inside a finalizer or a library's import is lost.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _asked:
        raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    _asked.append(number)
    raise KeyboardInterrupt
