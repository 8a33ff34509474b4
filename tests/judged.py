"""Made-up measurements of an original and an artifact, for tests of the gate."""

import math
from typing import Any

from compress.eval.results import (
    AnyItem,
    Fidelity,
    ItemizedMeasurement,
    PerplexityMetrics,
    QuestionItem,
    ScoreMetrics,
    TaskMeasurement,
    WindowItem,
)
from compress.gate.gate import Check, MeasuredModel, Verdict

TOKENS = 63
"""Tokens scored in a window of text."""


def question(number: int, right: bool) -> QuestionItem:
    return QuestionItem(
        id=f"q{number}",
        digest=f"digest-{number}",
        prompt="Which colour?",
        accepted=("red",),
        said="red" if right else "blue",
        cluster=f"image-{number}",
        score=float(right),
        token_ids=(1, 2),
        tokens=2,
        nll=0.5,
    )


def window(number: int, nll: float) -> WindowItem:
    return WindowItem(id=f"window-{number:05d}", digest=f"text-{number}", tokens=TOKENS, nll=nll)


def fidelity(**changes: Any) -> Fidelity:
    fields: dict[str, Any] = {"tokens": 800, "kl_mean": 0.01, "kl_p99": 0.2, "kl_interval": (0.008, 0.012), "top1_agreement": 0.97}
    return Fidelity(**(fields | changes))


def subject(
    name: str, size: int, right: list[bool] | None = None, nll: list[float] | None = None, alike: Fidelity | None = None
) -> MeasuredModel:
    tasks: dict[str, TaskMeasurement] = {}
    items: dict[str, tuple[AnyItem, ...]] = {}
    if right is not None:
        metrics = ScoreMetrics(task="vqa", metric="exact_match", score=sum(right) / len(right), items=len(right))
        tasks["scenes"] = TaskMeasurement(name="scenes", metrics=metrics, fidelity=alike)
        items["scenes"] = tuple(question(number, answer) for number, answer in enumerate(right))
    if nll is not None:
        tokens = TOKENS * len(nll)
        perplexity = PerplexityMetrics(perplexity=math.exp(sum(nll) / tokens), window=TOKENS + 1, windows=len(nll), tokens=tokens)
        tasks["text"] = TaskMeasurement(name="text", metrics=perplexity, fidelity=alike)
        items["text"] = tuple(window(number, value) for number, value in enumerate(nll))
    return MeasuredModel(artifact=name, bytes=size, measurement=ItemizedMeasurement(tasks, items))


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    original = [True] * (both + lost) + [False] * (gained + neither)
    artifact = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return original, artifact


def only(verdict: Verdict) -> Check:
    assert len(verdict.checks) == 1
    return verdict.checks[0]
