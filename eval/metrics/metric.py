"""The record of a metric: how an item is scored, how items are summed up, what a plan assumes of it, and how it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.eval.statistics.power import AssumedChanges, AssumedFlips

AnswerScore = Callable[[str, Sequence[str]], float]
"""Takes an answer and the accepted answers, and returns the score."""

Answers = Sequence[tuple[str | None, Sequence[str]]]
"""All items' answers, None where an item failed, with the accepted ones."""


def mean_score(items: Sequence[Any]) -> float:
    """Return the mean of items' scores."""
    # fsum: exact, so that the order of items cannot move a figure.
    return math.fsum(item.score for item in items) / len(items)


def _no_figures(answers: Answers) -> Mapping[str, float]:
    del answers
    return {}


@dataclass(frozen=True)
class Metric:
    """One metric; its file defines it, and a row of `METRICS` names it."""

    name: str
    """The name in definitions, measurements and reports."""

    score: AnswerScore | None = None
    """Scores a generated answer; None where scores come from elsewhere: likelihoods, embeddings, another harness."""

    fit: Callable[[Sequence[Sequence[str]]], AnswerScore] | None = None
    """In place of `score`, where that depends on the accepted answers of all items: returns it for them."""

    kinds: tuple[str, ...] = ()
    """The kinds of task whose definitions may name it."""

    note: str = ""
    """What the score is, for a report; `{drawn}` becomes the clause on sampling."""

    aggregate: Callable[[Sequence[Any]], float] = mean_score
    """Returns the figure over all items."""

    figures: Callable[[Answers], Mapping[str, float]] = _no_figures
    """Returns further figures over all items, by name."""

    assumed: AssumedFlips | AssumedChanges | None = field(default_factory=AssumedFlips)
    """What a plan assumes of an artifact's changes of the scores; None where recovery is not judged by it."""

    percent: bool = True
    """Whether it is shown in per cent, and so is its ratio to the original's."""

    larger_is_better: bool = True
    """Otherwise it is better the nearer it is to the original's: a lower perplexity is another model's too."""

    @property
    def binary(self) -> bool:
        """Whether every item's score is 0 or 1."""
        return isinstance(self.assumed, AssumedFlips)

    def scorer(self, accepted: Sequence[Sequence[str]]) -> AnswerScore:
        """Return the function that scores an answer, given the accepted answers of all items.

        Raises:
            ValueError: the metric does not score answers.
        """
        score = self.score if self.fit is None else self.fit(accepted)
        if score is None:
            raise ValueError(f"{self.name} does not score answers")
        return score

    def show(self, value: float) -> str:
        """Return a figure as tables show it."""
        return f"{value:.2%}" if self.percent else f"{value:.4g}"

    def show_ratio(self, ratio: float) -> str:
        """Return a figure's ratio to the original's as tables show it: per cent that are kept, or a multiple."""
        return f"{ratio:.2%}" if self.percent else f"×{ratio:.4f}"
