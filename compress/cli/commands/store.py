"""The actions of `compress store`: list, verify and prune the cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress.pipeline.store import Store, default_store
from compress.pipeline.store_entries import StoreItem
from compress.recipe.schema import is_local
from compress.report.model import size
from compress.untrusted.reading import printable

_DAY = 86_400.0

_STATES = {"output": "", "unfinished": "unfinished", "unreadable": "unreadable"}

Outcome = tuple[object, int]
"""An action's JSON output, and its exit code."""


def _open(options: argparse.Namespace) -> Store:
    return Store(options.store or default_store())


def _rows(items: list[StoreItem]) -> list[dict[str, object]]:
    return [
        {
            "key": item.key,
            "step": item.step,
            "model": item.origin.model,
            "recipe": item.origin.recipe,
            "bytes": item.bytes,
            "kind": item.kind,
            "path": str(item.folder),
        }
        for item in items
    ]


def _count(items: list[StoreItem]) -> str:
    """Return a summary of the number and size of entries, and of unfinished outputs."""
    entries = [item for item in items if item.kind != "unfinished"]
    unfinished = [item for item in items if item.kind == "unfinished"]
    summary = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size(sum(item.bytes for item in entries))}"
    if not unfinished:
        return summary
    return f"{summary}; of unfinished steps {len(unfinished)}, {size(sum(item.bytes for item in unfinished))}"


def _display_name(model: str) -> str:
    return Path(model).name if is_local(model) else model


def _list(options: argparse.Namespace, console: Console) -> Outcome:
    store = _open(options)
    items = store.items()
    table = Table("key", "step", "model", "recipe", "size", "last used", "", box=None, pad_edge=False)
    for item in items:
        days = (time.time() - item.used) / _DAY
        used = "today" if days < 1 else f"{days:.0f} days ago"
        names = (printable(text) for text in (item.step, _display_name(item.origin.model), item.origin.recipe))
        table.add_row(item.key[:12], *names, size(item.bytes), used, _STATES[item.kind])
    console.print(f"{store.folder}: {_count(items)}", highlight=False)
    if items:
        console.print(table)
    return _rows(items), 0


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
        for item in removed:
            console.print(f"{item.key[:12]}  {printable(item.step)}, {size(item.bytes)}", highlight=False, markup=False)
    return _rows(removed), 0


ACTIONS: Mapping[str, Callable[[argparse.Namespace, Console], Outcome]] = {"list": _list, "verify": _verify, "prune": _prune}
"""The actions of `compress store` by name; each prints its result for people."""
