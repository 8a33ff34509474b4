"""What the benchmarks of quality share: an artifact's KL from its original, item by item, and the ratio of two sides."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from compress.eval.measure import MeasureContext, measure
from compress.eval.results import read_items
from compress.eval.tasks.perplexity import Perplexity
from compress.eval.tasks.task import Task
from compress.eval.tasks.vqa import Vqa
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.runtime import Transformers

_RESAMPLES = 2000
_SEED = 0

Kls = dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
"""By task, each item's summed KL(original ‖ artifact) and its number of tokens."""


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what artifacts are measured on."""
    parser.add_argument("--test-text", type=Path, nargs="+", required=True)
    parser.add_argument("--test-questions", type=Path, help="JSONL or parquet; none for text alone")
    parser.add_argument("--definition", default="scenes", help="of the task that asks them")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of test text")
    parser.add_argument("--windows", type=int, default=64, help="of each test text")
    parser.add_argument("--questions", type=int, default=400, help="asked of the model")


@dataclass(frozen=True)
class Quality:
    """One artifact's figures."""

    figures: Mapping[str, float]
    """`accuracy` of the questions, and the perplexity and mean KL of each task."""

    kls: Kls


class Judge:
    """Measures artifacts of a model in the in-process runtime, in float32 on a CPU."""

    def __init__(self, model: Path, tasks: Sequence[Task], data: Mapping[str, Sequence[Path]], folder: Path) -> None:
        self._model = model
        self._tasks = tasks
        self._data = data
        self._folder = folder
        self._measured = 0
        self.original = self._measure(model, folder / "original", None)

    @classmethod
    def of(cls, arguments: argparse.Namespace, folder: Path) -> Self:
        """Return the judge that `add_test_options` and `--model` ask for, the original measured."""
        tasks: list[Task] = []
        data: dict[str, Sequence[Path]] = {}
        if arguments.test_questions:
            source = arguments.test_questions.resolve()
            fields = {"definition": arguments.definition, "source": str(source), "samples": arguments.questions}
            tasks.append(Vqa.model_validate({"task": "vqa", "name": "questions", **fields}))
            data["questions"] = (source,)
        for path in arguments.test_text:
            name = "text" if len(arguments.test_text) == 1 else path.stem
            fields = {"dataset": "text", "source": str(path.resolve()), "window": arguments.window, "samples": arguments.windows}
            tasks.append(Perplexity.model_validate({"task": "perplexity", "name": name, **fields}))
            data[name] = (path.resolve(),)
        return cls(arguments.model, tasks, data, folder)

    def measure(self, artifact: Path) -> Quality:
        """Return an artifact's figures."""
        self._measured += 1
        return self._measure(artifact, self._folder / f"measured {self._measured}", self._folder / "original")

    def _measure(self, artifact: Path, target: Path, original: Path | None) -> Quality:
        context = MeasureContext(
            original_checkpoint=self._model,
            data=self._data,
            output_dir=target,
            original_measurement=original,
            progress=Silent(),
            logs=target,
        )
        with Transformers(runtime="transformers").open(OpenContext.at(artifact, self._folder, Silent())) as session:
            measurement = measure(session, self._tasks, context)
        figures: dict[str, float] = {}
        kls: Kls = {}
        for task in measurement.tasks:
            if task.metrics.task == "vqa":
                figures["accuracy"] = task.metrics.score
            elif task.metrics.task == "perplexity":
                figures[f"{task.name}_perplexity"] = task.metrics.perplexity
            if task.fidelity is not None:
                figures[f"{task.name}_kl"] = task.fidelity.kl_mean
                items: list[Any] = [item for item in read_items(target, task.name) if getattr(item, "kl", None) is not None]
                kls[task.name] = (np.array([item.kl for item in items]), np.array([float(item.tokens) for item in items]))
        return Quality(figures, kls)


def kl_ratio(ours: Sequence[Quality], theirs: Sequence[Quality], task: str) -> dict[str, Any]:
    """Return our mean KL over theirs, with an interval of 95 %, both on the same draws of calibration samples and the same items.

    The interval is that of a paired bootstrap over draws and items together.
    """
    sums, others = (np.stack([quality.kls[task][0] for quality in side]) for side in (ours, theirs))
    random = np.random.default_rng(_SEED)
    draws, items = sums.shape
    ratios = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        picked = np.ix_(random.integers(draws, size=draws), random.integers(items, size=items))
        ratios[index] = sums[picked].sum() / others[picked].sum()
    return {"ratio": float(sums.sum() / others.sum()), "interval": [float(bound) for bound in np.quantile(ratios, (0.025, 0.975))]}


def mean_figures(draws: Sequence[Quality]) -> dict[str, float]:
    """Return the mean of each figure over draws of calibration samples, and the standard deviation of those that differ."""
    result: dict[str, float] = {}
    for name in draws[0].figures:
        values = [quality.figures[name] for quality in draws]
        result[name] = float(np.mean(values))
        if len(values) > 1:
            result[f"{name}_deviation"] = float(np.std(values, ddof=1))
    return result
