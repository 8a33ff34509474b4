"""An artifact paired with its original: what the checks of the gate share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compress.eval.results import check_pairs
from compress.eval.statistics.estimates import Finding
from compress.eval.statistics.paired import Pairs
from compress.gate.gate import Check, MeasuredModel, pairs_of


@dataclass(frozen=True)
class ArtifactChecks:
    """Builds the checks of one artifact at a target."""

    original: MeasuredModel
    artifact: MeasuredModel
    target: str

    def decide(self, check: str, limit: float, finding: Finding, reason: str, task: str | None = None) -> Check:
        """Return the check with a finding's outcome."""
        return Check(
            artifact=self.artifact.artifact,
            check=check,
            task=task,
            value=finding.value,
            interval=finding.interval,
            limit=limit,
            verdict=finding.outcome,
            reason=reason,
            items_needed=finding.items_needed,
            target=self.target,
            interval_level=finding.level if finding.interval is not None else None,
        )

    def inconclusive(self, check: str, limit: float, reason: str, task: str | None = None) -> Check:
        """Return an inconclusive check without a value, and the reason."""
        return Check(
            artifact=self.artifact.artifact,
            check=check,
            task=task,
            value=None,
            interval=None,
            limit=limit,
            verdict="inconclusive",
            reason=reason,
            target=self.target,
        )

    def unmeasured(self, check: str, limit: float) -> Check:
        """Return the inconclusive check of a limit without any measured task."""
        return self.inconclusive(check, limit, "nothing that was measured says anything about it; add a task to eval.tasks")

    def task_names(self, check: str) -> list[str]:
        """Return the original's tasks that are judged by a check of the gate."""
        return [name for name in self.original.measurement.tasks if check in self.original.measurement.judged_by(name)]

    def skip_reason(self, task: str) -> str | None:
        """Return the reason why the artifact was not measured on a task; None where it was."""
        if task in self.artifact.measurement.tasks:
            return None
        return f"{task}: not measured: {self.artifact.measurement.skipped.get(task, 'the task is missing')}"

    def of_each_task(self, check: str, limit: float, judge: Callable[[str], Check]) -> Iterator[Check]:
        """Yield a limit's check of each task, from `judge` where the artifact was measured on it; a check begins with its limit."""
        tasks = self.task_names(check.partition(".")[0])
        if not tasks:
            yield self.unmeasured(check, limit)
        for task in tasks:
            reason = self.skip_reason(task)
            yield judge(task) if reason is None else self.inconclusive(check, limit, reason, task)

    def pairs(self, task: str) -> Pairs:
        """Return the paired scores on the items that the artifact was measured on.

        Raises:
            DataError: the original was measured on other items.
        """
        artifact_items = self.artifact.measurement.scored(task)
        original_items = self.original.measurement.scored(task)
        # A stopped task has fewer items than the original's, which is measured on all: they are the first of the same order.
        if self.artifact.measurement.tasks[task].look is not None:
            original_items = original_items[: len(artifact_items)]
        # Paired tests on other items would give tight intervals around nothing: content is compared, not only names.
        check_pairs(task, original_items, ((item.id, item.digest) for item in artifact_items))
        return pairs_of(original_items, artifact_items)


def format_interval(
    interval: tuple[float, float] | None, level: float | None, format_value: Callable[[float], str], unit: str = ""
) -> str:
    """Return an interval in brackets with its confidence, such as ` (90% interval 0.98–1.01)`; empty where there is none."""
    if interval is None:
        return ""
    label = "" if level is None else f"{100 * level:.3g}% interval "
    return f" ({label}{format_value(interval[0])}–{format_value(interval[1])}{unit})"
