from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from compress.numerics.allocation import BudgetError, WidthOption, allocate

WIDTHS = (2, 3, 4, 8, 16)


def brute_force(groups: Mapping[str, Sequence[WidthOption]], budget: int) -> float:
    """Return the smallest loss of all combinations that fit."""
    fitting = (combination for combination in product(*groups.values()) if sum(choice.cost for choice in combination) <= budget)
    return min(sum(choice.loss for choice in combination) for combination in fitting)


def layers(generator: np.random.Generator, count: int) -> dict[str, list[WidthOption]]:
    """Draw layers as models have them: few shapes, losses over orders of magnitude that fall fourfold or so per bit."""
    groups: dict[str, list[WidthOption]] = {}
    for number in range(count):
        weights = int(generator.choice([1024, 4096, 11008, 12345]))
        scale = 10 ** generator.uniform(-8, 0)
        losses = scale * 4.0 ** -np.array(WIDTHS) * generator.uniform(0.3, 2, len(WIDTHS))
        losses[-1] = 0
        groups[f"layer {number}"] = [
            WidthOption(width, weights * width // 8 + weights // 64, float(loss))
            for width, loss in zip(WIDTHS, losses, strict=True)
        ]
    return groups


@pytest.mark.parametrize("seed", range(40))
def test_the_loss_is_the_smallest_that_fits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = layers(generator, int(generator.integers(1, 6)))
    costs = [sum(choices[index].cost for choices in groups.values()) for index in (0, -1)]
    for share in (0, *generator.uniform(0, 1, 3), 1, 2):
        budget = int(costs[0] + share * (costs[1] - costs[0]))
        chosen = allocate(groups, budget)
        assert list(chosen) == list(groups)
        assert all(choice in groups[name] for name, choice in chosen.items())
        assert sum(choice.cost for choice in chosen.values()) <= budget
        assert sum(choice.loss for choice in chosen.values()) == pytest.approx(brute_force(groups, budget), rel=1e-9)


def test_a_whole_model_is_solved_and_the_same_each_time() -> None:
    groups = layers(np.random.default_rng(0), 300)
    budget = sum(choices[2].cost for choices in groups.values())
    chosen = allocate(groups, budget)
    uniform = sum(choices[2].loss for choices in groups.values())
    assert sum(choice.cost for choice in chosen.values()) <= budget
    assert sum(choice.loss for choice in chosen.values()) < uniform / 2
    assert allocate(groups, budget) == chosen
    for name, choice in chosen.items():  # no single layer could be given more
        dearer = [other for other in groups[name] if other.loss < choice.loss]
        left = budget - sum(other.cost for other in chosen.values())
        assert all(other.cost - choice.cost > left for other in dearer)


def test_alike_layers_share_what_there_is() -> None:
    groups = {name: [WidthOption(2, 2, 9.0), WidthOption(4, 4, 1.0), WidthOption(8, 8, 0.5)] for name in "abc"}
    chosen = allocate(groups, 11)
    assert sorted(choice.width for choice in chosen.values()) == [2, 4, 4]
    assert chosen == allocate(groups, 11)


def test_a_wider_choice_that_brings_nothing_is_not_taken() -> None:
    groups = {"a": [WidthOption(2, 2, 0.0), WidthOption(4, 4, 0.0), WidthOption(8, 8, 0.1)]}
    assert allocate(groups, 100)["a"].width == 2


def test_a_budget_below_the_smallest_possible_says_so() -> None:
    groups = {name: [WidthOption(3, 30, 1.0), WidthOption(2, 20, 2.0)] for name in "ab"}
    with pytest.raises(BudgetError, match="a budget of 39 is below 40, the smallest possible") as error:
        allocate(groups, 39)
    assert error.value.smallest == 40
    assert [choice.width for choice in allocate(groups, 40).values()] == [2, 2]
