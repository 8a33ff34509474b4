"""`compress store`: list, verify and prune the cache of step outputs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.options import add_options, console
from compress.untrusted.reading import printable

if TYPE_CHECKING:
    from rich.console import Console

    from compress.pipeline.store import Store
    from compress.pipeline.store_entries import StoreItem

_DAY = 86_400.0

_HELP = {
    "list": "what is there, the latest used first",
    "verify": "read every file again",
    "prune": "remove what was not used for long",
}

_STATES = {"output": "", "unfinished": "unfinished", "unreadable": "unreadable"}

Outcome = tuple[object, int]
"""An action's JSON output, and its exit code."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, help_text in _HELP.items():
        action = actions.add_parser(name, help=help_text)
        add_options(action, "--store", "--json")
        if name == "prune":
            unused_help = "days without use (default: 30; 0: all)"
            action.add_argument("--unused-for", type=_days, default=30.0, metavar="DAYS", help=unused_help)
            action.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
            action.add_argument("--keep", type=float, metavar="GB", help="then remove the longest unused until this size is left")


def run(options: argparse.Namespace) -> int:
    """Run an action on the store and print its outcome."""
    value, code = _ACTIONS[options.action](options, console(options))
    if options.json:
        print(json.dumps(value, indent=2))
    return code


def _days(text: str) -> float:
    days = float(text)
    # argparse turns a ValueError into a usage error; NaN fails both comparisons.
    if not 0 <= days < float("inf"):
        raise ValueError
    return days


def _open(options: argparse.Namespace) -> Store:
    from compress.pipeline.store import Store, default_store

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
    from compress.report.figures import size

    entries = [item for item in items if item.kind != "unfinished"]
    unfinished = [item for item in items if item.kind == "unfinished"]
    summary = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size(sum(item.bytes for item in entries))}"
    if not unfinished:
        return summary
    return f"{summary}; of unfinished steps {len(unfinished)}, {size(sum(item.bytes for item in unfinished))}"


def _display_name(model: str) -> str:
    from compress.recipe.schema import is_local

    return Path(model).name if is_local(model) else model


def _list(options: argparse.Namespace, console: Console) -> Outcome:
    from rich.table import Table

    from compress.report.figures import size

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
    from compress.report.figures import size

    # Powers of 1000, as the sizes that are shown.
    keep = None if options.keep is None else round(options.keep * 1e9)
    removed = _open(options).prune(unused_for=options.unused_for * _DAY, keep_bytes=keep, dry=options.dry_run)
    console.print(f"{'would remove' if options.dry_run else 'removed'} {_count(removed)}", highlight=False)
    if options.dry_run:
        for item in removed:
            console.print(f"{item.key[:12]}  {printable(item.step)}, {size(item.bytes)}", highlight=False, markup=False)
    return _rows(removed), 0


_ACTIONS: Mapping[str, Callable[[argparse.Namespace, Console], Outcome]] = {"list": _list, "verify": _verify, "prune": _prune}
"""Each prints its result for people."""
