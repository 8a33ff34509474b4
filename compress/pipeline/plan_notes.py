"""The notes of a plan, before anything is run: on the exports, on statistical power, and on limits that cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoints.artifact import side_files
from compress.checkpoints.checkpoint import Checkpoint, text_config
from compress.checkpoints.quantization_config import KernelKind
from compress.checkpoints.spec import CheckpointSpec
from compress.checkpoints.tokenizer_files import cutting_settings
from compress.export.format import Export
from compress.gate.gate import SizeLimit
from compress.recipe.model import AnyEvaluation, Recipe
from compress.report.figures import counted
from compress.report.figures import size as shown_size
from compress.runtimes.runtime import Served
from compress.runtimes.top_tokens_runtime import TopTokensRuntime

_BYTES_PER_TOKEN = 66
"""Of a server's answer for each token of the vocabulary, as vLLM writes it: 10 MB at 152,000."""

_MUCH = 1_000_000_000
"""Bytes of answers from which on a plan notes them: below, they take less than a task's own questions."""

_HEADER_BYTES = 300
"""The most bytes that a tensor takes in a safetensors header and the index; of files on a hub only the tensors' bytes are known."""


def outlook_notes(recipe: Recipe, outlooks: Sequence[CheckpointSpec], original_bytes: int) -> tuple[str, ...]:
    """Return the notes that apply to every possible outcome of the run, and those that depend on the stages' choices, marked so.

    `original_bytes` is the size of the original's weights.
    """
    notes_by_outlook = [export_notes(recipe.export, outlook, original_bytes) for outlook in outlooks]
    all_notes = dict.fromkeys(note for notes in notes_by_outlook for note in notes)
    # A stage such as `bits: auto` chooses in the run: what holds for some of its outcomes only is marked.
    return tuple(
        note if all(note in notes for notes in notes_by_outlook) else f"where the stage chooses so: {note}" for note in all_notes
    )


def export_notes(exports: Sequence[Export], outlook: CheckpointSpec, original_bytes: int | None = None) -> tuple[str, ...]:
    """Return the notes of the exports of one checkpoint."""
    return tuple(dict.fromkeys(note for export in exports for note in export.notes(outlook, original_bytes)))


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """Return the truncation and padding settings of a folder's tokenizer, which artifacts do not carry."""
    return tuple(
        f"{name} holds {' and '.join(settings)}, by which prompts would be cut or filled up, and vLLM fails on images; "
        "here prompts are read whole, and artifacts are written without"
        for name, settings in cutting_settings(folder).items()
    )


def kernels(
    evaluation: AnyEvaluation, formats: Mapping[str, str], kernel_kinds: Mapping[str, frozenset[KernelKind]]
) -> tuple[list[str], list[str]]:
    """Return the faults of artifacts whose kernels do not run on this machine, and notes on those that do.

    `formats` and `kernel_kinds` hold each artifact's format, and its matrix products that need a kernel where known, by its name.
    """
    faults: dict[str, None] = {}
    notes: dict[str, None] = {}
    for target in evaluation.eval.places:
        for artifact, export_format in formats.items():
            if target.runtime.runs(export_format):
                needed = kernel_kinds.get(artifact, frozenset())
                faults |= dict.fromkeys(f"{artifact} at {target.name}: {fault}" for fault in target.runtime.kernel_faults(needed))
                notes |= dict.fromkeys(f"{artifact} at {target.name}: {note}" for note in target.runtime.kernel_notes(needed))
    return list(faults), list(notes)


def full_vocabulary(evaluation: AnyEvaluation, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what asking servers for likelihoods over the whole vocabulary sends, where that is much."""
    vocabulary: object = text_config(config).get("vocab_size")
    size = _BYTES_PER_TOKEN * vocabulary if isinstance(vocabulary, int) else 0
    asked = {
        target.name: target.runtime.whole_tokens
        for target in evaluation.eval.places
        if Served in target.runtime.offers and isinstance(target.runtime, TopTokensRuntime)
    }
    return tuple(
        f"at {name} every model scores {tokens:,} tokens of each task over the whole vocabulary, in about "
        f"{shown_size(tokens * size)} of answers: many minutes of a server on a CPU; fewer whole_tokens take less, and with "
        "whole_tokens: 0 max_kl cannot pass"
        for name, tokens in asked.items()
        if tokens * size >= _MUCH
    )


def unmeasured(evaluation: AnyEvaluation) -> tuple[str, ...]:
    """Return the tasks that a target's server cannot run, with its reason."""
    return tuple(
        f"task {task.name}: not measured at {target.name}: {reason}"
        for target in evaluation.eval.places
        for need, reason in target.runtime.missing().items()
        for task in evaluation.eval.tasks
        if need in task.needs
    )


def power(evaluation: AnyEvaluation, items: Mapping[str, int]) -> tuple[str, ...]:
    """Return the loss that the number of items resolves, for each task with an accuracy limit.

    `items` is the number of each task's items, where its data were read; for the others, `samples` is taken.
    """
    from compress.eval.metrics import load_metric
    from compress.eval.statistics.power import POWER, items_for, resolved_loss
    from compress.eval.statistics.sequential import Sequential

    limit = evaluation.gate.accuracy
    if limit is None:
        return ()
    plan = Sequential.even(limit.sequential, limit.confidence) if limit.sequential else None
    # Of the last look: an artifact without loss usually reaches it, and its level is a little stricter than a single test's.
    level = plan.nominal(limit.sequential - 1).passing if plan and limit.sequential else 1 - limit.confidence
    notes: list[str] = []
    for task in evaluation.eval.tasks:
        samples, available = task.samples, items.get(task.name, task.samples)
        assumed = load_metric(task.metric_name).assumed
        if "accuracy" not in task.judged_by() or assumed is None or available is None:
            continue
        fewer_note = (
            f" ({samples:,} are asked for, and its data hold no more)" if samples is not None and available < samples else ""
        )
        needed_items = items_for(limit.of(task.name), level, assumed)
        needed_note = f"; a limit of {100 * limit.of(task.name):g} % needs {needed_items:,}" if needed_items else ""
        loss = resolved_loss(available, level, assumed)
        resolution = f"resolve {100 * loss:.1f} points" if loss else "resolve nothing"
        notes.append(
            f"{task.name}: {counted(available, 'item')}{fewer_note} {resolution} (so far below the original a limit is passed by "
            f"an artifact that loses nothing with {100 * POWER:g} % probability, "
            f"if {assumed.describe()}){needed_note}"
        )
    return tuple(notes)


def size_notes(recipe: Recipe, checkpoint: Checkpoint, exports: Mapping[int, int]) -> tuple[str, ...]:
    """Return the size limits that an export cannot meet; `exports` are the predicted bytes of weights, by position in the recipe.

    The prediction counts tensors only and takes the original at its largest, so that no limit is reported that might be met.
    """
    other_bytes = sum((checkpoint.folder / name).stat().st_size for name in ("config.json", *side_files(checkpoint.folder)))
    original_bytes = checkpoint.weight_bytes + other_bytes + _HEADER_BYTES * len(checkpoint.tensors)
    weights = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    notes: dict[str, None] = {}
    for target in recipe.eval.places:
        limit = recipe.gate.at(target.name).size
        if limit is None:
            continue
        for position, predicted in exports.items():
            export = recipe.export[position]
            if target.runtime.runs(export.format):
                notes |= dict.fromkeys(_size_faults(export.artifact, limit, (predicted, other_bytes), (original_bytes, weights)))
    return tuple(notes)


def _size_faults(artifact: str, limit: SizeLimit, artifact_bytes: tuple[int, int], original: tuple[int, int]) -> Iterator[str]:
    """Yield the limits that an artifact cannot meet.

    `artifact_bytes` are the predicted bytes of weights and those of the other files; `original` are the original's bytes and its
    number of weights.
    """
    predicted, other_bytes = artifact_bytes
    original_bytes, weights = original
    rows = (
        ("max_ratio", (predicted + other_bytes) / original_bytes, limit.max_ratio, "times the original's bytes"),
        ("max_bits_per_weight", 8 * predicted / weights, limit.max_bits_per_weight, "bits per weight"),
        ("max_bytes", predicted + other_bytes, limit.max_bytes, "bytes"),
    )
    for name, value, allowed, unit in rows:
        if allowed is not None and value > allowed:
            yield (
                f"the gate cannot pass: {artifact} will take {_figure(value)} {unit}, and gate.size.{name} allows "
                f"{_figure(allowed)}; quantize more of the model (targets), use fewer bits, or raise the limit"
            )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
