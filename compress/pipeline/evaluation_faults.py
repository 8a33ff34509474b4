"""What of a recipe's evaluation its model or a runtime does not support, each fault with file, line and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.export.format import Export
from compress.families import Family
from compress.recipe.document import RecipeDocument, dotted
from compress.recipe.model import AnyEvaluation
from compress.runtimes.runtime import Capability, Embeds, Served, runtimes_for, runtimes_that


def task_faults(evaluation: AnyEvaluation, document: RecipeDocument, family: Family, exports: Sequence[Export]) -> list[str]:
    """Return the faults of tasks and latency that the model or a runtime does not support; remedies run all `exports`."""
    generates = family.head is not None
    faults: list[str] = []
    if evaluation.eval.latency is not None and not generates:
        where = document.whereabouts(("eval", "latency"))
        faults.append(
            f"{where}: eval.latency: is measured of answers, and {family.name} compares images with texts and writes none; leave "
            "it out"
        )
    for position, task in enumerate(evaluation.eval.tasks):
        key = ("eval", "tasks", position)
        where = f"{document.whereabouts(key)}: {dotted(key)}"
        # What a task needs tells its kind: only comparisons of images with texts need embeddings.
        if generates != (Embeds not in task.needs):
            does, alternative = ("writes text", "vqa or perplexity") if generates else ("compares images with texts", "zero-shot")
            faults.append(f"{where}: {family.name} {does}, which {task.task} does not measure; use {alternative}")
            continue
        for target in evaluation.eval.places:
            runtime = target.runtime
            if lacking := set(task.needs) - runtime.offers:
                does_not = f"runtime {runtime.runtime} does not offer {task.task}"
                if Served in lacking:
                    does_not = f"{task.task} needs a server, and runtime {runtime.runtime} has none for harnesses to ask"
                faults.append(f"{where}: {does_not}; {_remedy(exports, task.needs)}")
    return faults


def length_faults(evaluation: AnyEvaluation, document: RecipeDocument, config: Mapping[str, Any]) -> list[str]:
    """Return the faults of runtimes whose context is shorter than the recipe's settings or its tasks' windows."""
    # Perplexity windows alone have a length that is known before a tokenizer runs.
    longest = max(task.text_tokens for task in evaluation.eval.tasks)
    faults: list[str] = []
    for position, target in enumerate(evaluation.eval.places):
        key = ("eval", "runtime") if evaluation.eval.targets is None else ("eval", "targets", position)
        where = f"{document.whereabouts(key)}: {dotted(key)}"
        faults += [f"{where}: {fault}" for fault in target.runtime.length_faults(config, longest)]
    return faults


def _remedy(exports: Sequence[Export], needs: Iterable[Capability]) -> str:
    """Return the sentence that names the runtimes which offer what is needed and run the exported formats."""
    supporting = sorted(runtimes_that(lambda runtime: runtime.offers.issuperset(needs)), reverse=True)
    formats = sorted({export.format for export in exports})
    usable = [name for name in supporting if not formats or name in runtimes_for(*formats)]
    if usable:
        return f"set eval.runtime to {' or '.join(usable)}"
    return f"what does ({', '.join(supporting)}) runs no {' or '.join(formats)}; use another format, or leave the task out"
