"""What a plan tells before anything is made: of the exports, of what the items can show, and of what the gate must make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from compress.artifact import side_files
from compress.checkpoint import Checkpoint, text_config
from compress.export.format import Outlook
from compress.figures import counted
from compress.figures import size as shown_size
from compress.gate import SizeLimit
from compress.plan_data import asked_at_most
from compress.quantization_config import Product
from compress.recipe import Recipe
from compress.tokenizer_files import cutting_settings

_BYTES_PER_TOKEN = 66
"""Of a server's answer for each token of the vocabulary: 10 MB at 152,000."""

_MUCH = 1_000_000_000
"""Bytes of answers from which on a plan tells of them: below, they take less than a task's own questions."""

_LISTED = 300
"""What a tensor takes in a header and an index, in bytes, at most; of a hub's files only the tensors' own bytes are known here."""


def outlook_notes(recipe: Recipe, outlooks: list[Outlook]) -> tuple[str, ...]:
    """Return what one should know of whatever comes out, and what only where the run chooses to hold linears so."""
    noted = [export_notes(recipe, outlook) for outlook in outlooks]
    every = dict.fromkeys(note for notes in noted for note in notes)
    return tuple(note if all(note in notes for notes in noted) else f"where the stage chooses so: {note}" for note in every)


def export_notes(recipe: Recipe, outlook: Outlook) -> tuple[str, ...]:
    """Return what one should know of the exports of one checkpoint."""
    return tuple(dict.fromkeys(note for export in recipe.export for note in export.notes(outlook)))


def tokenizer_notes(folder: Path) -> tuple[str, ...]:
    """Return what of a folder's tokenizer artifacts do not carry: settings that would cut prompts, or fill them up."""
    return tuple(
        f"{name} holds {' and '.join(settings)}, by which prompts would be cut or filled up, and vLLM fails on images; "
        "here prompts are read whole, and artifacts are written without"
        for name, settings in cutting_settings(folder).items()
    )


def kernels(recipe: Recipe, products: Mapping[str, frozenset[Product]]) -> tuple[list[str], list[str]]:
    """Return why artifacts cannot be measured on this machine, and what one should know of what is measured of them here.

    `products` are what each artifact needs kernels for, by its name.
    """
    faults: dict[str, None] = {}
    notes: dict[str, None] = {}
    runs = {export.artifact: export.runtimes for export in recipe.export}
    for target in recipe.eval.places:
        for artifact, needed in products.items():
            if target.runtime.runtime in runs.get(artifact, {target.runtime.runtime}):
                faults |= dict.fromkeys(f"{artifact} at {target.name}: {fault}" for fault in target.runtime.kernel_faults(needed))
                notes |= dict.fromkeys(f"{artifact} at {target.name}: {note}" for note in target.runtime.kernel_notes(needed))
    return list(faults), list(notes)


def whole_vocabulary(recipe: Recipe, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what asking servers for likelihoods over the whole vocabulary sends, where that is much."""
    vocabulary: object = text_config(config).get("vocab_size")
    size = _BYTES_PER_TOKEN * vocabulary if isinstance(vocabulary, int) else 0
    asked = {
        target.name: cast("int", getattr(target.runtime, "whole_tokens", 0))
        for target in recipe.eval.places
        if target.runtime.asks_server
    }
    return tuple(
        f"at {name} every model scores {tokens:,} tokens of each task over the whole vocabulary, in about "
        f"{shown_size(tokens * size)} of answers: many minutes of a server on a CPU; fewer whole_tokens take less, and with "
        "whole_tokens: 0 max_kl cannot pass"
        for name, tokens in asked.items()
        if tokens * size >= _MUCH
    )


def unmeasured(recipe: Recipe) -> tuple[str, ...]:
    """Return which tasks a target's servers cannot be asked, by what they say of themselves."""
    return tuple(
        f"task {task.name}: not measured at {target.name}: {why}"
        for target in recipe.eval.places
        for need, why in target.runtime.missing().items()
        for task in recipe.eval.tasks
        if task.needs == need
    )


def power(recipe: Recipe, items: Mapping[str, int]) -> tuple[str, ...]:
    """Return, for each task that the gate judges by its items, what so many of them can show.

    `items` says how many each task asks, where the data were read; of the others `samples` says how many it asks at most.
    """
    from compress.eval.power import POWER, Assumed, items_for, resolved_loss
    from compress.eval.sequential import Sequential

    limit = recipe.gate.accuracy
    if limit is None:
        return ()
    plan = Sequential.even(limit.sequential, limit.confidence) if limit.sequential else None
    level = plan.nominal(limit.sequential - 1).passing if plan and limit.sequential else 1 - limit.confidence
    assumed = Assumed()
    told: list[str] = []
    for task in recipe.eval.tasks:
        most = asked_at_most(task)
        asked = items.get(task.name, most)
        if task.name not in recipe.judged_tasks or asked is None:
            continue
        few = f" ({most:,} are asked for, and its data hold no more)" if most is not None and asked < most else ""
        wanted = items_for(limit.of(task.name), level, assumed)
        needed = f"; a limit of {100 * limit.of(task.name):g} % needs {wanted:,}" if wanted else ""
        loss = resolved_loss(asked, level, assumed)
        shown = f"resolve {100 * loss:.1f} points" if loss else "resolve nothing"
        told.append(
            f"{task.name}: {counted(asked, 'item')}{few} {shown} (so far below the original a limit is passed by an artifact that "
            f"loses nothing with {100 * POWER:g} % probability, if {100 * assumed.flips:g} % of the items flip and "
            f"{100 * assumed.accuracy:g} % are right){needed}"
        )
    return tuple(told)


def size_notes(recipe: Recipe, checkpoint: Checkpoint, exports: Mapping[int, int]) -> tuple[str, ...]:
    """Return which limits on size an export cannot keep; `exports` are the predicted bytes of weights, by position.

    What is predicted are the tensors alone, and the original is taken as large as it can be, so that no limit is told of that might
    be kept.
    """
    beside = sum((checkpoint.folder / name).stat().st_size for name in ("config.json", *side_files(checkpoint.folder)))
    whole = checkpoint.weight_bytes + beside + _LISTED * len(checkpoint.tensors)
    weights = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    told: dict[str, None] = {}
    for target in recipe.eval.places:
        limit = recipe.gate.at(target.name).size
        if limit is None:
            continue
        for position, predicted in exports.items():
            export = recipe.export[position]
            if target.runtime.runtime in export.runtimes:
                told |= dict.fromkeys(_size_faults(export.artifact, limit, (predicted, beside), (whole, weights)))
    return tuple(told)


def _size_faults(artifact: str, limit: SizeLimit, made: tuple[int, int], original: tuple[int, int]) -> Iterator[str]:
    """Yield which parts of a limit an artifact cannot keep, of predicted bytes of weights and bytes beside them.

    `original` are the original's bytes, and how many weights it has.
    """
    predicted, beside = made
    whole, weights = original
    rows = (
        ("max_ratio", (predicted + beside) / whole, limit.max_ratio, "times the original's bytes"),
        ("max_bits_per_weight", 8 * predicted / weights, limit.max_bits_per_weight, "bits per weight"),
        ("max_bytes", predicted + beside, limit.max_bytes, "bytes"),
    )
    for name, value, most, unit in rows:
        if most is not None and value > most:
            yield (
                f"the gate cannot pass: {artifact} will take {_figure(value)} {unit}, and gate.size.{name} allows {_figure(most)}; "
                "quantize more of the model (targets), use fewer bits, or raise the limit"
            )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
