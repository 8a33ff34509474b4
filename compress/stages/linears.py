"""Selection of the linears that a stage quantizes, by component and name; free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from compress.checkpoints.spec import CheckpointSpec
from compress.families import Family, within

Target = Literal["decoder", "vision", "projector", "lm_head"]
"""A component of a model whose linears a stage can target."""

_MATRIX = 2


@dataclass(frozen=True)
class Linear:
    """A linear layer of a checkpoint, with a weight [rows, columns] = [out, in]."""

    component: Target

    name: str
    """Its name in the model, without `.weight`."""

    disk_name: str
    """Its name in the checkpoint, without `.weight`."""

    rows: int
    columns: int

    dtype: str
    """The type of its weight on disk, as safetensors names it."""


@dataclass(frozen=True)
class LinearSelection:
    """The selected linears, in the checkpoint's order, and the faults of the selection's targets and patterns."""

    linears: tuple[Linear, ...]
    faults: tuple[str, ...]


def select(before: CheckpointSpec, targets: Iterable[Target], ignore: Iterable[str]) -> LinearSelection:
    """Return the linears of the targeted components whose names, in the model and on disk, match no pattern of `ignore`.

    Patterns are shell patterns (`*.down_proj`). A target or pattern that matches nothing is a fault.
    """
    patterns = tuple(ignore)
    faults: list[str] = []
    targeted: list[Linear] = []
    for target in targets:
        # codes for a tied head would be codes for the embeddings as well, which a lookup cannot read
        tied = target == "lm_head" and before.tied
        linears = [linear for linear in _linears(before) if not tied and linear.component == target]
        if not linears:
            reason = "its output head is the embedding's own matrix" if target == "lm_head" else "it has no such linear layers"
            faults.append(f"targets: {target} matches nothing in {before.source}: {reason}; remove it")
        targeted += linears
    # a pattern that matches nothing is mostly a mistyped one, and the layer would be quantized in silence
    faults += [
        f"ignore: {pattern!r} matches none of the targeted layers, such as {targeted[0].name}; mend or remove it"
        for pattern in patterns
        if targeted and not any(_matches(linear, pattern) for linear in targeted)
    ]
    selected = tuple(linear for linear in targeted if not any(_matches(linear, pattern) for pattern in patterns))
    if targeted and not selected:
        faults.append("ignore: leaves no layer to work on; remove a pattern")
    return LinearSelection(selected, tuple(faults))


def _linears(before: CheckpointSpec) -> Iterable[Linear]:
    """Yield the linears of all components, those included that are quantized already."""
    for tensor, spec in before.tensors.items():
        disk_name, _, suffix = tensor.rpartition(".")
        # selected all the same, so that a stage can say which of its layers an earlier one has quantized
        packed = suffix == "weight_packed"
        if packed or (suffix == "weight" and len(spec.shape) == _MATRIX):
            name = before.family.module_name(f"{disk_name}.weight").removesuffix(".weight")
            component = _component_of(name, before.family)
            if component is not None:
                rows, columns = before.shape(disk_name)
                yield Linear(component, name, disk_name, rows, columns, spec.dtype)


def _component_of(name: str, family: Family) -> Target | None:
    if name == family.head:
        return "lm_head"
    components: tuple[tuple[tuple[str, ...], Target], ...] = (
        ((family.blocks,), "decoder"),
        (family.projector, "projector"),
        (family.vision_blocks, "vision"),
    )
    return next((component for prefixes, component in components if any(within(name, prefix) for prefix in prefixes)), None)


def _matches(linear: Linear, pattern: str) -> bool:
    return fnmatchcase(linear.name, pattern) or fnmatchcase(linear.disk_name, pattern)
