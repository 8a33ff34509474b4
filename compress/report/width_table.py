"""The page's part on mixed precision: which width each layer got, what it is predicted to cost, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compress.eval.results import Fidelity
from compress.report.figures import kl_value
from compress.stages.quantization.widths import FusedLayers, Widths

_BLOCK_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
"""A layer's name as prefix, block number and name within the block."""


@dataclass(frozen=True)
class WidthMap:
    """The bit widths of a stage by kind of layer and block."""

    blocks: tuple[int, ...]
    rows: tuple[tuple[str, tuple[FusedLayers | None, ...]], ...]
    """A kind of layer each, with its width in each block; None where a block has no such layer."""

    others: tuple[FusedLayers, ...]
    """Layers outside of blocks."""


def width_map(widths: Widths) -> WidthMap:
    """Return the widths by kind of layer and block."""
    by_kind: dict[str, dict[int, FusedLayers]] = {}
    others: list[FusedLayers] = []
    for group in widths.groups:
        match = _BLOCK_LAYER.fullmatch(group.layers[0])
        if match is None:
            others.append(group)
        else:
            by_kind.setdefault(f"{match[1]}: {_kind(group.layers)}", {})[int(match[2])] = group
    blocks = tuple(sorted({number for by_block in by_kind.values() for number in by_block}))
    rows = tuple((_short(kind, by_kind), tuple(by_block.get(number) for number in blocks)) for kind, by_block in by_kind.items())
    return WidthMap(blocks, rows, tuple(others))


def _short(kind: str, kinds: Iterable[str]) -> str:
    """Return a kind without its blocks' prefix, unless another kind has the same name."""
    name = kind.partition(": ")[2]
    # Vision and language blocks of some families have layers of the same names.
    return name if [other.partition(": ")[2] for other in kinds].count(name) == 1 else kind


def width_table(stage: str, widths: Widths, measured: Mapping[str, Mapping[str, Fidelity]]) -> str:
    """Return, in Markdown, a stage's widths and predicted loss beside the KL `measured` of each artifact by task.

    Blocks whose layers of one kind have the same width share a line.
    """
    lines = ["| layers | blocks | width | bits/weight | predicted loss |", "| --- | --- | ---: | ---: | ---: |"]
    for (kind, width), groups in _folded(widths.groups).items():
        blocks = _ranges(int(match[2]) for group in groups if (match := _BLOCK_LAYER.fullmatch(group.layers[0])))
        bits = sum(group.bytes for group in groups) * 8 / sum(group.weights for group in groups)
        loss = sum(group.predicted_loss for group in groups)
        lines.append(f"| {kind} | {blocks} | {width if width < 16 else '16 (as it was)'} | {bits:.2f} | {loss:.2g} |")
    return f"{stage}: {widths_sentence(widths, measured, 'in the layers below')}{'' if measured else '.'}\n\n" + "\n".join(lines)


def widths_sentence(widths: Widths, measured: Mapping[str, Mapping[str, Fidelity]], where: str) -> str:
    """Return a stage's bits per weight and its predicted loss beside the KL `measured`, without the full stop."""
    kl = "; ".join(
        f"{artifact}: " + ", ".join(f"{task} {kl_value(fidelity)}" for task, fidelity in tasks.items())
        for artifact, tasks in measured.items()
    )
    return (
        f"{widths.bits_per_weight:.3g} bits per weight {where}, scales and zero points counted. Predicted: a loss of "
        f"{widths.predicted_loss:.2g} nats per text token of the calibration samples{f'; measured KL of {kl}' if kl else ''}"
    )


def _folded(groups: Iterable[FusedLayers]) -> dict[tuple[str, int], list[FusedLayers]]:
    """Return groups by kind and width: kinds in the order of the model, then the widths from small to large."""
    by_kind: dict[str, dict[int, list[FusedLayers]]] = {}
    for group in groups:
        by_kind.setdefault(_kind(group.layers), {}).setdefault(group.width, []).append(group)
    return {(kind, width): by_width[width] for kind, by_width in by_kind.items() for width in sorted(by_width)}


def _kind(layers: Sequence[str]) -> str:
    """Return what layers are called without the number of their block: `self_attn.q_proj, k_proj, v_proj`."""
    match = _BLOCK_LAYER.fullmatch(layers[0])
    return ", ".join([match[3] if match else layers[0], *(layer.rpartition(".")[2] for layer in layers[1:])])


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people list them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
