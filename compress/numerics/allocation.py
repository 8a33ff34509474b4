"""Which width each group of layers gets, so that the predicted loss is smallest within a budget: solved exactly; free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

_SCALE = 1e6
"""What the losses are stretched to before they are given to the solver, which stops at differences of 1e-6."""


@dataclass(frozen=True)
class WidthOption:
    """One width a group of layers could have: what it takes, in bytes or any other whole unit, and the loss it brings."""

    width: int
    cost: int
    loss: float


@dataclass(frozen=True)
class BudgetError(ValueError):
    """The budget is below the smallest possible cost."""

    smallest: int
    budget: int

    def __str__(self) -> str:
        return f"a budget of {self.budget} is below {self.smallest}, the smallest possible"


def allocate(groups: Mapping[str, Sequence[WidthOption]], budget: int) -> dict[str, WidthOption]:
    """Return each group's choice such that the sum of losses is smallest among all whose costs sum to `budget` at most.

    A multiple-choice knapsack, solved as a mixed-integer linear program (HiGHS by way of `scipy.optimize.milp`). Choices that
    another of the same group matches in loss at no more cost, or the same at less, are never taken. The same input gives the same
    result.

    Raises:
        BudgetError: no choice of widths fits.
    """
    kept = {name: _undominated(choices) for name, choices in groups.items()}
    smallest = sum(choices[0].cost for choices in kept.values())
    if smallest > budget:
        raise BudgetError(smallest, budget)
    if sum(choices[-1].cost for choices in kept.values()) <= budget:
        return {name: choices[-1] for name, choices in kept.items()}
    # what each group takes at least is paid: the program is about what is left, in the largest unit that all share
    extra = [[choice.cost - choices[0].cost for choice in choices] for choices in kept.values()]
    unit = reduce(math.gcd, [cost for costs in extra for cost in costs], 0)
    room = (budget - smallest) // unit
    picks = _solve(
        [[cost // unit for cost in costs] for costs in extra],
        [[choice.loss - choices[-1].loss for choice in choices] for choices in kept.values()],
        room,
    )
    return {name: choices[pick] for (name, choices), pick in zip(kept.items(), picks, strict=True)}


def _undominated(choices: Sequence[WidthOption]) -> list[WidthOption]:
    """Return the choices that are worth their cost, the cheapest first; their losses fall."""
    kept: list[WidthOption] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.loss, choice.width)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _solve(costs: list[list[int]], losses: list[list[float]], room: int) -> list[int]:
    """Return the index picked in each group; the pick's variable is 1, the others of its group 0."""
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
        flat_losses * (_SCALE / flat_losses.max()),
        integrality=np.ones(count),
        bounds=library.Bounds(0, 1),
        constraints=[
            library.LinearConstraint(one_each, 1, 1),
            library.LinearConstraint(sparse.csr_array(flat_costs[None, :]), -np.inf, room),
        ],
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise ArithmeticError(f"the solver gave no widths: {result.message}")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    picks = [int(np.argmax(result.x[start:end])) for start, end in pairwise(starts)]
    if sum(group[pick] for group, pick in zip(costs, picks, strict=True)) > room:
        raise ArithmeticError("the solver's widths do not fit the budget; report this as a bug of the solver")
    return picks
