"""Keys of recipes that had another name once: the old one is still read, and the plan and the run name the new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from compress.errors import RecipeError
from compress.recipe.document import Place, RecipeDocument, dotted

_ANY = "*"


@dataclass(frozen=True)
class RenamedKey:
    """A key by its path, `*` standing for any key or position; `values` are those that have other names too."""

    path: tuple[str, ...]
    name: str
    values: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())


RENAMED_KEYS = (
    RenamedKey(("stages", _ANY, "leave_out"), "ignore"),
    RenamedKey(("stages", _ANY, "dampening"), "dampening_frac"),
    RenamedKey(("stages", _ANY, "order"), "actorder", {"activation": "static"}),
    RenamedKey(("eval", "liveness"), "grounding"),
    RenamedKey(("gate", "liveness"), "grounding"),
    RenamedKey(("gate", "targets", _ANY, "liveness"), "grounding"),
)
"""The new names are those of llm-compressor's modifiers (`ignore`, `dampening_frac`, `actorder`), and the papers' for grounding."""


def rename_keys(document: RecipeDocument) -> list[str]:
    """Give a recipe's keys their names of today, in place; return a line for each that had another.

    Raises:
        RecipeError: a key stands there under both names.
    """
    notes: list[str] = []
    faults: list[str] = []
    for key in RENAMED_KEYS:
        # A list first: the tables change while they are walked.
        for place, parent in list(_tables_with(document.data, key.path, ())):
            old, new = (*place, key.path[-1]), (*place, key.name)
            where = f"{document.whereabouts(old)}: {dotted(old)}"
            if key.name in parent:
                faults.append(f"{where}: is called {key.name} now, which stands there too; remove {key.path[-1]}")
                continue
            value = parent.pop(key.path[-1])
            parent[key.name] = key.values.get(value, value) if isinstance(value, str) else value
            changed = f": {parent[key.name]}" if parent[key.name] != value else ""
            notes.append(f"{where}: is called {key.name}{changed} now; the old name is read, write the new one")
            # Faults found later name the new key: its line must be known.
            _move(document.lines, old, new)
            _move(document.overridden, old, new)
    if faults:
        raise RecipeError(faults)
    return notes


def _tables_with(data: Any, path: tuple[str, ...], place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield each table that has the last key of a path, and where it stands."""
    head, *rest = path
    if not rest:
        if isinstance(data, dict) and head in data:
            yield place, cast("dict[str, Any]", data)
        return
    if isinstance(data, dict):
        table = cast("dict[str, Any]", data)
        names = list(table) if head == _ANY else [head] if head in table else []
        for name in names:
            yield from _tables_with(table[name], tuple(rest), (*place, name))
    elif isinstance(data, list) and head == _ANY:
        for position, item in enumerate(cast("list[Any]", data)):
            yield from _tables_with(item, tuple(rest), (*place, position))


def _move(noted: dict[Place, Any], old: Place, new: Place) -> None:
    """Let what is noted of a place, and of all below it, be noted of another."""
    for place in [place for place in noted if place[: len(old)] == old]:
        noted[(*new, *place[len(old) :])] = noted.pop(place)
