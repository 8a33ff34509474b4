"""Bit allocation: the width of each group of layers that minimizes the predicted loss within a budget, exactly; free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

_SCALE = 1e6
"""The largest loss as the solver sees it: HiGHS stops at differences of 1e-6, whatever the unit."""


@dataclass(frozen=True)
class WidthOption:
    """One width that a group of layers could have."""

    width: int
    """In bits."""

    cost: int
    """In bytes, or any other whole unit."""

    loss: float
    """The predicted loss of the group at this width."""


@dataclass(frozen=True)
class BudgetError(ValueError):
    """The budget is below the smallest possible cost."""

    smallest: int
    budget: int

    def __str__(self) -> str:
        return f"a budget of {self.budget} is below {self.smallest}, the smallest possible"


def allocate(groups: Mapping[str, Sequence[WidthOption]], budget: int) -> dict[str, WidthOption]:
    """Return each group's choice such that the sum of losses is smallest among all whose costs sum to `budget` at most.

    A multiple-choice knapsack, solved as a mixed-integer linear program (HiGHS through `scipy.optimize.milp`). Dominated options,
    with another in the group at no more cost and no more loss, are never chosen. Deterministic.

    Raises:
        BudgetError: no choice of widths fits.
    """
    candidates = {name: _undominated(options) for name, options in groups.items()}
    smallest = sum(options[0].cost for options in candidates.values())
    if smallest > budget:
        raise BudgetError(smallest, budget)
    # the best of every group fits; past this line some group has two options, so that `unit` is above 0
    if sum(options[-1].cost for options in candidates.values()) <= budget:
        return {name: options[-1] for name, options in candidates.items()}
    # costs are counted from each group's cheapest option and in their greatest common divisor: the solver sees small numbers
    extra_costs = [[option.cost - options[0].cost for option in options] for options in candidates.values()]
    unit = reduce(math.gcd, [cost for costs in extra_costs for cost in costs], 0)
    remaining = (budget - smallest) // unit
    picks = _solve(
        [[cost // unit for cost in costs] for costs in extra_costs],
        [[option.loss - options[-1].loss for option in options] for options in candidates.values()],
        remaining,
    )
    return {name: options[pick] for (name, options), pick in zip(candidates.items(), picks, strict=True)}


def _undominated(options: Sequence[WidthOption]) -> list[WidthOption]:
    """Return the options on the Pareto front of cost and loss, the cheapest first."""
    front: list[WidthOption] = []
    # the width decides between equals, so that the result does not depend on the order of the recipe's widths
    for option in sorted(options, key=lambda option: (option.cost, option.loss, option.width)):
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def _solve(costs: list[list[int]], losses: list[list[float]], limit: int) -> list[int]:
    """Return the index picked in each group: one binary variable per option, of which each group has exactly one at 1."""
    # imported here: every plan loads this module, and scipy is slow to import
    import numpy as np
    from scipy import optimize, sparse

    sizes = [len(group) for group in costs]
    count = sum(sizes)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    one_each = sparse.csr_array((np.ones(count), (owners, np.arange(count))), shape=(len(sizes), count))
    flat_costs = np.array([cost for group in costs for cost in group], dtype=float)
    flat_losses = np.array([loss for group in losses for loss in group])
    library: Any = optimize
    result = library.milp(
        # above 0: on each front the loss falls strictly, and it was shifted by the group's smallest
        flat_losses * (_SCALE / flat_losses.max()),
        integrality=np.ones(count),
        bounds=library.Bounds(0, 1),
        constraints=[
            library.LinearConstraint(one_each, 1, 1),
            library.LinearConstraint(sparse.csr_array(flat_costs[None, :]), -np.inf, limit),
        ],
        # by default HiGHS stops within 1e-4 of the optimum: the widths would then depend on the order of its search
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ArithmeticError(f"the solver gave no widths: {result.message}")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # a binary variable is integral within the solver's tolerance only: 0.9999999 is a pick
    picks = [int(np.argmax(result.x[start:end])) for start, end in pairwise(starts)]
    # the solver may exceed a constraint by its tolerance too; in whole units that is checked exactly
    if sum(group[pick] for group, pick in zip(costs, picks, strict=True)) > limit:
        raise ArithmeticError("the solver's widths do not fit the budget; report this as a bug of the solver")
    return picks
