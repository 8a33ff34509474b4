"""The page's part on mixed precision: which width each layer got, what it is predicted to cost, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from compress.eval.results import Fidelity
from compress.report.figures import kl_value
from compress.stages.quantization.widths import GroupWidth, Widths

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")


def width_table(stage: str, widths: Widths, measured: Mapping[str, Mapping[str, Fidelity]]) -> str:
    """Return, in Markdown, a stage's widths and predicted loss beside the KL `measured` of each artifact by task.

    Blocks whose layers of one kind have the same width share a line.
    """
    lines = ["| layers | blocks | width | bits/weight | predicted loss |", "| --- | --- | ---: | ---: | ---: |"]
    for (kind, width), groups in _folded(widths.groups).items():
        blocks = _ranges(int(match[2]) for group in groups if (match := _NUMBERED.fullmatch(group.layers[0])))
        bits = sum(group.bytes for group in groups) * 8 / sum(group.weights for group in groups)
        loss = sum(group.predicted_loss for group in groups)
        lines.append(f"| {kind} | {blocks} | {width if width < 16 else '16 (as it was)'} | {bits:.2f} | {loss:.2g} |")
    found = "; ".join(
        f"{artifact}: " + ", ".join(f"{task} {kl_value(fidelity)}" for task, fidelity in tasks.items())
        for artifact, tasks in measured.items()
    )
    total = (
        f"{stage}: {widths.bits_per_weight:.3g} bits per weight in the layers below, scales and zero points counted. Predicted: "
        f"a loss of {widths.predicted_loss:.2g} nats per text token of the calibration samples"
    )
    return f"{total}; measured KL of {found}\n\n" + "\n".join(lines) if found else f"{total}.\n\n" + "\n".join(lines)


def _folded(groups: Iterable[GroupWidth]) -> dict[tuple[str, int], list[GroupWidth]]:
    """Return groups by kind and width: kinds in the order of the model, then the widths from small to large."""
    by_kind: dict[str, dict[int, list[GroupWidth]]] = {}
    for group in groups:
        by_kind.setdefault(_kind(group.layers), {}).setdefault(group.width, []).append(group)
    return {(kind, width): by_width[width] for kind, by_width in by_kind.items() for width in sorted(by_width)}


def _kind(layers: Sequence[str]) -> str:
    """Return what layers are called without the number of their block: `self_attn.q_proj, k_proj, v_proj`."""
    names = [match[3] if (match := _NUMBERED.fullmatch(layer)) else layer for layer in layers]
    return ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people list them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
