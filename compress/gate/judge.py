"""The verdict on artifacts: every limit of the gate checked for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from compress.errors import UsageError
from compress.eval.statistics.estimates import Outcome
from compress.gate.checks import checks_of
from compress.gate.gate import Check, Gate, MeasuredModel, Verdict, worst


def judge(gate: Gate, original: MeasuredModel, artifacts: Sequence[MeasuredModel], target: str = "local") -> Verdict:
    """Check every artifact against the limits at a target, paired item by item with the original.

    An artifact passes only if every one of its checks does, so passing needs no correction for multiple tests: all of them would
    have to err for a bad artifact to pass. Failing is corrected: otherwise a good one would fail on one of many tasks by chance.

    Raises:
        UsageError: there are no artifacts.
        DataError: an artifact was measured on other items than the original; names the first.
    """
    if not artifacts:
        raise UsageError("the gate was given no artifact; export at least one")
    checks: list[Check] = []
    outcomes: dict[str, Outcome] = {}
    for artifact in artifacts:
        # Each for itself: Holm's correction is over one artifact's tasks, not over artifacts, which are published one by one.
        artifact_checks = list(checks_of(gate.at(target), original, artifact, target))
        outcomes[artifact.artifact] = worst([check.verdict for check in artifact_checks])
        checks += artifact_checks
    return Verdict(verdict=worst(list(outcomes.values())), artifacts=outcomes, checks=tuple(checks))
