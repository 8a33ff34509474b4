"""What `compress store` does with the cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress.report import size
from compress.schema import is_local
from compress.store import Store, default_store
from compress.store_entries import StoreItem
from compress.untrusted import printable

_DAY = 86_400.0

_STATES = {"output": "", "unfinished": "unfinished", "unreadable": "unreadable"}

Outcome = tuple[object, int]
"""What an action gives as JSON, and the exit code."""


def _open(options: argparse.Namespace) -> Store:
    return Store(options.store or default_store())


def _rows(found: list[StoreItem]) -> list[dict[str, object]]:
    return [
        {
            "key": held.key,
            "step": held.step,
            "model": held.origin.model,
            "recipe": held.origin.recipe,
            "bytes": held.bytes,
            "kind": held.kind,
            "path": str(held.folder),
        }
        for held in found
    ]


def _count(found: list[StoreItem]) -> str:
    """Return how many entries there are and how much room they take, what interrupted steps keep apart."""
    entries, rest = [held for held in found if held.kind != "unfinished"], [held for held in found if held.kind == "unfinished"]
    told = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size(sum(held.bytes for held in entries))}"
    return f"{told}; of unfinished steps {len(rest)}, {size(sum(held.bytes for held in rest))}" if rest else told


def _named(model: str) -> str:
    return Path(model).name if is_local(model) else model


def _list(options: argparse.Namespace, console: Console) -> Outcome:
    store = _open(options)
    found = store.held()
    table = Table("key", "step", "model", "recipe", "size", "last used", "", box=None, pad_edge=False)
    for held in found:
        days = (time.time() - held.used) / _DAY
        used = "today" if days < 1 else f"{days:.0f} days ago"
        named = (printable(text) for text in (held.step, _named(held.origin.model), held.origin.recipe))
        table.add_row(held.key[:12], *named, size(held.bytes), used, _STATES[held.kind])
    console.print(f"{store.folder}: {_count(found)}", highlight=False)
    if found:
        console.print(table)
    return _rows(found), 0


def _verify(options: argparse.Namespace, console: Console) -> Outcome:
    store = _open(options)
    faults = store.verify()
    for key, fault in faults.items():
        console.print(f"{key[:12]}: {fault}; a run that needs it makes it again", highlight=False, markup=False)
    console.print(f"{len(store.entries())} entries read, {len(faults)} damaged", highlight=False)
    return faults, 1 if faults else 0


def _prune(options: argparse.Namespace, console: Console) -> Outcome:
    keep = None if options.keep is None else round(options.keep * 1e9)
    removed = _open(options).prune(unused_for=options.unused_for * _DAY, keep_bytes=keep, dry=options.dry_run)
    console.print(f"{'would remove' if options.dry_run else 'removed'} {_count(removed)}", highlight=False)
    if options.dry_run:
        for held in removed:
            console.print(f"{held.key[:12]}  {printable(held.step)}, {size(held.bytes)}", highlight=False, markup=False)
    return _rows(removed), 0


ACTIONS: Mapping[str, Callable[[argparse.Namespace, Console], Outcome]] = {"list": _list, "verify": _verify, "prune": _prune}
"""The actions of `compress store` by name; each shows people what it did."""
