"""Which linears of a checkpoint a stage works on, found by their names on disk; free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from compress.checkpoint import Checkpoint
from compress.families import Family, within
from compress.output_head import head_is_tied

Target = Literal["decoder", "vision", "projector", "lm_head"]
"""A part of a model whose linears a stage can be told to work on."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: its component, its name in the model and on disk (both without `.weight`), shape [out, in], type on disk."""

    part: Target
    name: str
    disk_name: str
    rows: int
    columns: int
    dtype: str


@dataclass(frozen=True)
class LinearSelection:
    """The linears a stage works on, in the checkpoint's order, and why there are fewer than was asked for."""

    linears: tuple[Linear, ...]
    faults: tuple[str, ...]


def select(checkpoint: Checkpoint, family: Family, targets: Iterable[Target], ignore: Iterable[str]) -> LinearSelection:
    """Return the linears of the targeted parts without those whose name, in the model or on disk, matches a pattern of `ignore`.

    Patterns are shell patterns (`*.down_proj`). A target or pattern that matches nothing is a fault.
    """
    patterns = tuple(ignore)
    faults: list[str] = []
    found: list[Linear] = []
    for target in targets:
        tied = target == "lm_head" and head_is_tied(checkpoint, family)
        linears = [linear for linear in _linears(checkpoint, family) if not tied and linear.part == target]
        if not linears:
            reason = "its output head is the embedding's own matrix" if target == "lm_head" else "it has no such linear layers"
            faults.append(f"targets: {target} matches nothing in {checkpoint.folder}: {reason}; leave it away")
        found += linears
    faults += [
        f"ignore: {pattern!r} matches none of the targeted layers, such as {found[0].name}; mend or remove it"
        for pattern in patterns
        if found and not any(_matches(linear, pattern) for linear in found)
    ]
    kept = tuple(linear for linear in found if not any(_matches(linear, pattern) for pattern in patterns))
    if found and not kept:
        faults.append("ignore: leaves no layer to work on; remove a pattern")
    return LinearSelection(kept, tuple(faults))


def _linears(checkpoint: Checkpoint, family: Family) -> Iterable[Linear]:
    for disk_name, entry in checkpoint.tensors.items():
        if disk_name.endswith(".weight") and len(entry.shape) == 2:
            name = family.module_name(disk_name).removesuffix(".weight")
            part = _part_of(name, family)
            if part is not None:
                yield Linear(part, name, disk_name.removesuffix(".weight"), entry.shape[0], entry.shape[1], entry.dtype)


def _part_of(name: str, family: Family) -> Target | None:
    if name == family.head:
        return "lm_head"
    parts: tuple[tuple[tuple[str, ...], Target], ...] = (
        ((family.blocks,), "decoder"),
        (family.projector, "projector"),
        (family.vision_blocks, "vision"),
    )
    return next((part for prefixes, part in parts if any(within(name, prefix) for prefix in prefixes)), None)


def _matches(linear: Linear, pattern: str) -> bool:
    return fnmatchcase(linear.name, pattern) or fnmatchcase(linear.disk_name, pattern)
