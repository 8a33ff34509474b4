"""What a measurement holds: figures per task, and one record per item, so that two models' items can be paired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from compress.errors import DataError
from compress.files import write_text
from compress.schema import Frozen

MEASUREMENT = "measurement.json"


Unit = Literal["token", "image"]
"""What one prediction is of."""


class AccuracyMetrics(Frozen):
    """Of how many items a model says what is right."""

    accuracy: float
    right: int
    items: int


class VqaMetrics(AccuracyMetrics):
    """How many of the questions a model answers right."""

    task: Literal["vqa"] = "vqa"
    definition_version: int


class ZeroShotMetrics(AccuracyMetrics):
    """Of how many images a model finds the right one of so many classes likeliest."""

    task: Literal["zero-shot"] = "zero-shot"
    classes: int


class PerplexityMetrics(Frozen):
    """How well a model predicts text: exp of the mean negative log-likelihood over all scored tokens."""

    task: Literal["perplexity"] = "perplexity"
    perplexity: float
    window: int
    windows: int
    tokens: int


Metrics = Annotated[VqaMetrics | PerplexityMetrics | ZeroShotMetrics, Field(discriminator="task")]


class Fidelity(Frozen):
    """How alike an artifact's predictions are to the original's on the same tokens, or images where `unit` says so.

    `kl_mean` and `kl_p99` are of KL(original ‖ artifact) per token in nats, `kl_interval` the bounds of the mean, each with
    95 % confidence, by windows or answers (None for a single one); `top1_agreement` is the share of tokens where both put the
    same one first. Of a VQA task, the original's own answers are the tokens. `lost` items went from right to wrong, `gained`
    from wrong to right, and of `changed` ones the (normalized) answer is another.
    """

    unit: Unit = "token"
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    lost: int | None = None
    gained: int | None = None
    changed: int | None = None


class TaskMeasurement(Frozen):
    """One task's figures; `fidelity` is None for the original."""

    name: str
    metrics: Metrics
    fidelity: Fidelity | None = None


class Measurement(Frozen):
    """All tasks' figures for one model in one runtime: the content of `measurement.json`."""

    tasks: tuple[TaskMeasurement, ...]


class JudgedItem(Frozen):
    """One item that is answered right or wrong."""

    id: str
    digest: str
    accepted: tuple[str, ...]
    said: str
    right: bool


class QuestionItem(JudgedItem):
    """One question and what was said to it; `token_ids` is the answer as tokens, the end token included where it ended.

    `tokens`, `nll`, `kl` and `same_top` belong to the original's answer: number of tokens, and sums over them.
    """

    item: Literal["question"] = "question"
    prompt: str
    token_ids: tuple[int, ...]
    tokens: int
    nll: float
    kl: float | None = None
    same_top: int | None = None


class ImageItem(JudgedItem):
    """One image and the class that was found likeliest; `nll` is of the right one, `kl` of the likelihoods of all classes."""

    item: Literal["image"] = "image"
    nll: float
    kl: float | None = None
    same_top: int | None = None


class WindowItem(Frozen):
    """One window of text: the digest of its token ids, the number of tokens scored, and sums over them."""

    item: Literal["window"] = "window"
    id: str
    digest: str
    tokens: int
    nll: float
    kl: float | None = None
    same_top: int | None = None


AnyItem = QuestionItem | WindowItem | ImageItem
_ITEM: TypeAdapter[AnyItem] = TypeAdapter(Annotated[AnyItem, Field(discriminator="item")])


@dataclass(frozen=True)
class Measured:
    """A measurement with its items, by task name."""

    tasks: dict[str, TaskMeasurement]
    items: dict[str, tuple[AnyItem, ...]]

    def judged(self, name: str) -> tuple[JudgedItem, ...]:
        """Return the items of a task that are answered right or wrong."""
        return tuple(item for item in self.items[name] if isinstance(item, JudgedItem))

    def questions(self, name: str) -> tuple[QuestionItem, ...]:
        """Return the items of a VQA task."""
        return tuple(item for item in self.items[name] if isinstance(item, QuestionItem))

    def windows(self, name: str) -> tuple[WindowItem, ...]:
        """Return the items of a perplexity task."""
        return tuple(item for item in self.items[name] if isinstance(item, WindowItem))


def items_path(folder: Path, name: str) -> Path:
    """Return where a measurement's folder holds a task's items."""
    return folder / f"items-{name}.jsonl"


def write_items(folder: Path, name: str, items: Sequence[AnyItem]) -> None:
    """Write a task's items, one JSON object a line."""
    lines = "".join(item.model_dump_json() + "\n" for item in items)
    write_text(items_path(folder, name), lines)


def write_measurement(folder: Path, measurement: Measurement) -> None:
    """Write `measurement.json`."""
    write_text(folder / MEASUREMENT, measurement.model_dump_json(indent=2) + "\n")


def read_items(folder: Path, name: str) -> tuple[AnyItem, ...]:
    """Read a task's items.

    Raises:
        DataError: there are none, or a line cannot be read; run the measurement again.
    """
    path = items_path(folder, name)
    items: list[AnyItem] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            items.append(_ITEM.validate_json(line))
        except ValidationError as error:
            raise DataError(f"{path}:{number}: no item of a measurement; measure again with --fresh") from error
    return tuple(items)


def read_measured(folder: Path) -> Measured:
    """Read a measurement's folder.

    Raises:
        DataError: a file is missing or damaged; run the measurement again.
    """
    path = folder / MEASUREMENT
    try:
        measurement = Measurement.model_validate_json(_read(path))
    except ValidationError as error:
        raise DataError(f"{path}: no measurement; measure again with --fresh") from error
    names = [task.name for task in measurement.tasks]
    return Measured(
        tasks={task.name: task for task in measurement.tasks},
        items={name: read_items(folder, name) for name in names},
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure again with --fresh") from error


def check_pairs(task: str, original: Sequence[JudgedItem | WindowItem], artifact: Iterable[tuple[str, str]]) -> None:
    """Check that two models met the same items in the same order; `artifact` gives each item's id and digest.

    Raises:
        DataError: the first item that differs, or is missing on one side, is named.
    """
    theirs = [(item.id, item.digest) for item in original]
    ours = list(artifact)
    for (their_id, their_digest), (our_id, our_digest) in zip(theirs, ours, strict=False):
        if their_id != our_id or their_digest != our_digest:
            what = f"item {our_id} has another content" if their_id == our_id else f"item {our_id} stands where {their_id} was"
            raise DataError(f"task {task}: {what} when the original was measured; measure the original again with --fresh")
    if len(theirs) != len(ours):
        raise DataError(
            f"task {task}: {len(ours)} items, and {len(theirs)} when the original was measured; measure the original again with "
            "--fresh"
        )
