"""An artifact beside its original, as every check of the gate holds a limit against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.eval.paired import Pairs
from compress.eval.results import PerplexityMetrics, ScoreMetrics, check_pairs
from compress.eval.statistics import Finding
from compress.gate import Check, Subject, pairs_of


@dataclass(frozen=True)
class ArtifactChecks:
    """The limits of the gate at a target, held against one artifact."""

    original: Subject
    artifact: Subject
    target: str

    def decide(self, check: str, limit: float, finding: Finding, reason: str, task: str | None = None) -> Check:
        """Return the check that a finding settles, or leaves open."""
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

    def leave_open(self, check: str, limit: float, reason: str, task: str | None = None) -> Check:
        """Return a check that cannot be settled, and why."""
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
        """Return a check that nothing was measured for."""
        return self.leave_open(check, limit, "nothing that was measured says anything about it; add a task to eval.tasks")

    def names(self, kind: type[ScoreMetrics | PerplexityMetrics]) -> list[str]:
        """Return the tasks of a kind that the original was measured on."""
        return [name for name, task in self.original.measured.tasks.items() if isinstance(task.metrics, kind)]

    def skipped(self, task: str) -> str | None:
        """Return why the artifact was not measured on a task; None where it was."""
        if task in self.artifact.measured.tasks:
            return None
        return f"{task}: not measured: {self.artifact.measured.skipped.get(task, 'the task is missing')}"

    def pairs(self, task: str) -> Pairs:
        """Return the scores of both on the items that the artifact was asked.

        Raises:
            DataError: they are others than the original's.
        """
        after = self.artifact.measured.scored(task)
        before = self.original.measured.scored(task)
        if self.artifact.measured.tasks[task].look is not None:
            before = before[: len(after)]
        check_pairs(task, before, ((item.id, item.digest) for item in after))
        return pairs_of(before, after)


def bounds_told(interval: tuple[float, float] | None, level: float | None, tell: Callable[[float], str], unit: str = "") -> str:
    """Return bounds in brackets, named by their confidence as a whole; empty where there are none."""
    if interval is None:
        return ""
    named = "" if level is None else f"{100 * level:.3g}% interval "
    return f" ({named}{tell(interval[0])}–{tell(interval[1])}{unit})"
