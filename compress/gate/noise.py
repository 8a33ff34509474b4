"""Limits held against the noise floor: how far the original is from itself when it is asked again, in another order and batches.

A figure of an artifact holds that noise too, so what it says of a limit depends on the floor:

- the floor keeps to the limit: the figure is compared with the limit, and fails it only where it is shown to be above the floor;
- the floor is above the limit, so that not even the original keeps to it: the figure cannot pass, whatever it is, and fails only
  where what it exceeds the floor by is above the limit. All between is inconclusive, and the remedy is to raise the limit.

KL and flips are tested item by item (`eval.statistics.noise`); the 99th percentile of KL and top-1 agreement have no bounds, and
are compared as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.eval.statistics.estimates import Excess, Finding


@dataclass(frozen=True)
class NoiseFloor:
    """A figure of the original asked again, and how the artifact's stands to it; larger figures are worse."""

    floor: float
    text: str
    """The floor as reasons show it."""

    excess: float
    """What the artifact's figure exceeds the floor by: the lower bound where there is a test, else the difference."""

    p_value: float | None = None
    """Of the hypothesis that the artifact's figure is at the floor or below; None where there is no test."""

    @classmethod
    def of(cls, value: float, floor: float, text: str, test: Excess | None = None) -> NoiseFloor:
        """Return the floor for an artifact's `value`, by a test where there is one."""
        if test is None or test.interval is None:
            return cls(floor, text, value - floor)
        return cls(floor, text, test.interval[0], test.p_value)

    def hold(self, finding: Finding, limit: float, remedy: str) -> tuple[Finding, str]:
        """Return a finding as it holds against the floor, and why it is inconclusive now; empty where it stands.

        `limit` is in the floor's sense, larger being worse; `remedy` says what to do about a limit that the floor is above.
        """
        test = "" if self.p_value is None else f" (p = {self.p_value:.2g})"
        if self.floor > limit:
            # What exceeds the floor is the artifact's own part: where that alone is above the limit, the failure is not noise.
            if finding.outcome == "fail" and self.excess > limit:
                return finding, ""
            remark = f": that is beyond what the original itself keeps to when it is asked again; {remedy}"
        elif finding.outcome == "fail" and self.excess <= 0:
            remark = (
                ": but it is not shown to be further off than the original is from itself, asked in another order and batch" + test
            )
        else:
            return finding, ""
        return replace(finding, outcome="inconclusive", items_needed=None), remark
