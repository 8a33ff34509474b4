"""What `compress store` does with the cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from compress.report import size
from compress.store import Entry, Store, default_store

_DAY = 86_400.0

Outcome = tuple[object, int]
"""What an action gives as JSON, and the exit code."""


def _open(options: argparse.Namespace) -> Store:
    return Store(options.store or default_store())


def _rows(entries: list[Entry]) -> list[dict[str, object]]:
    return [{"key": entry.key, "step": entry.step, "bytes": entry.bytes, "path": str(entry.folder)} for entry in entries]


def _list(options: argparse.Namespace, console: Console) -> Outcome:
    store = _open(options)
    entries = store.entries()
    table = Table("key", "step", "size", "last used", box=None, pad_edge=False)
    for entry in entries:
        days = (time.time() - entry.used) / _DAY
        table.add_row(entry.key[:12], entry.step, size(entry.bytes), "today" if days < 1 else f"{days:.0f} days ago")
    console.print(f"{store.folder}: {len(entries)} entries, {size(sum(entry.bytes for entry in entries))}", highlight=False)
    if entries:
        console.print(table)
    return _rows(entries), 0


def _verify(options: argparse.Namespace, console: Console) -> Outcome:
    store = _open(options)
    faults = store.verify()
    for key, fault in faults.items():
        console.print(f"{key[:12]}: {fault}; a run that needs it makes it again", highlight=False, markup=False)
    console.print(f"{len(store.entries())} entries read, {len(faults)} damaged", highlight=False)
    return faults, 1 if faults else 0


def _prune(options: argparse.Namespace, console: Console) -> Outcome:
    keep = None if options.keep is None else round(options.keep * 1e9)
    removed = _open(options).prune(unused_for=options.unused_for * _DAY, keep_bytes=keep)
    console.print(f"removed {len(removed)} entries, {size(sum(entry.bytes for entry in removed))}", highlight=False)
    return _rows(removed), 0


ACTIONS: Mapping[str, Callable[[argparse.Namespace, Console], Outcome]] = {"list": _list, "verify": _verify, "prune": _prune}
"""The actions of `compress store` by name; each shows people what it did."""
