"""What a measurement holds: figures per task, and one record per item, so that two models' items can be paired."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from compress.errors import DataError
from compress.files import write_bytes, write_text
from compress.schema import Frozen

Item = TypeVar("Item")

MEASUREMENT = "measurement.json"
GROUNDING = "grounding"
"""What stands in a task's place in the name of the file with the items that show whether answers depend on images."""


Unit = Literal["token", "image"]
"""What one prediction is of."""


class ScoreMetrics(Frozen):
    """How well a model does on a task's items: `score` is the mean over all of them, those that failed counting 0.

    `binary` says that every item is right (1) or wrong (0). `details` holds further figures of the task by their names.
    """

    task: Literal["vqa", "choice", "caption", "zero-shot", "retrieval", "adapter"]
    metric: str
    score: float
    items: int
    failed: int = 0
    binary: bool = True
    definition_version: int | None = None
    details: Mapping[str, float] = Field(default_factory=lambda: dict[str, float]())


class PerplexityMetrics(Frozen):
    """How well a model predicts text: exp of the mean negative log-likelihood over all scored tokens."""

    task: Literal["perplexity"] = "perplexity"
    perplexity: float
    window: int
    windows: int
    tokens: int
    failed: int = 0


Metrics = Annotated[ScoreMetrics | PerplexityMetrics, Field(discriminator="task")]


class WholeKl(Frozen):
    """KL over the whole vocabulary, estimated for all of a task's tokens from `tokens` of them, drawn by lot.

    Each bound of `kl_interval` holds with 95 % confidence (`interval_level` is that of both together); with 95 %, too, the 99th
    percentile is at most `kl_p99_at_most`. Both are None where too few tokens were drawn.
    """

    tokens: int
    kl_mean: float
    kl_interval: tuple[float, float] | None
    kl_p99_at_most: float | None
    interval_level: float = 0.9


class Fidelity(Frozen):
    """How alike an artifact's predictions are to the original's on the same tokens, or images where `unit` says so.

    `kl_mean` and `kl_p99` are of KL(original ‖ artifact) per token in nats, `kl_interval` the bounds of the mean, each with 95 %
    confidence, so that they are a 90 % interval (`interval_level`), by windows or answers (None for a single one). Where
    `at_least`, they are over the likeliest tokens and the rest as one, which bounds KL from below; `whole` is then what tokens
    drawn by lot say of the KL over the whole vocabulary, None where the runtime gives none. `top1_agreement` is the share of
    tokens where both put the same one first. Of a VQA task, the original's own answers are the tokens. `lost` items score less
    than they did (were right, are wrong), `gained` ones more, and of `changed` ones the (normalized) answer is another.
    """

    unit: Unit = "token"
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_interval: tuple[float, float] | None
    top1_agreement: float
    at_least: bool = False
    whole: WholeKl | None = None
    interval_level: float = 0.9
    lost: int | None = None
    gained: int | None = None
    changed: int | None = None


class TaskMeasurement(Frozen):
    """One task's figures; `fidelity` is None for the original, `noise` is the original's, asked again otherwise, for it alone.

    Where items were drawn in `looks` parts, `look` is after which of them it was settled.
    """

    name: str
    metrics: Metrics
    fidelity: Fidelity | None = None
    noise: Fidelity | None = None
    look: int | None = None
    looks: int | None = None


class Grounding(Frozen):
    """Whether answers depend on the image: the same questions of a task with their own image, with another one's, and with none.

    `score_own`, `score_other` and `score_none` are the mean scores, `changed_other` and `changed_none` the shares of answers that
    are not those to the own image. `failed` items, whatever they failed at, are in none of them.
    """

    task: str
    metric: str
    binary: bool
    items: int
    failed: int
    score_own: float
    score_other: float
    score_none: float | None
    changed_other: float
    changed_none: float | None


class Measurement(Frozen):
    """All tasks' figures for one model in one runtime: the content of `measurement.json`."""

    tasks: tuple[TaskMeasurement, ...]
    grounding: Grounding | None = None
    skipped: Mapping[str, str] = Field(default_factory=lambda: dict[str, str]())
    """Tasks that the runtime could not measure, and why."""


class ScoredItem(Frozen):
    """One item that is answered, with its score by the task's metric (1 right, 0 wrong where it is one or the other).

    `cluster` is what items that depend on each other share: their images. `fault` says why there is no answer; the score is 0 then.
    """

    id: str
    digest: str
    cluster: str
    accepted: tuple[str, ...]
    said: str
    score: float
    fault: str | None = None


class QuestionItem(ScoredItem):
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


class ImageItem(ScoredItem):
    """One image and the class that was found likeliest; `nll` is of the right one, `kl` of the likelihoods of all classes."""

    item: Literal["image"] = "image"
    nll: float
    kl: float | None = None
    same_top: int | None = None


class AdapterItem(ScoredItem):
    """One item of another evaluation harness's task."""

    item: Literal["adapter"] = "adapter"


class WindowItem(Frozen):
    """One window of text: the digest of its token ids, the number of tokens scored, and sums over them."""

    item: Literal["window"] = "window"
    id: str
    digest: str
    tokens: int
    nll: float
    kl: float | None = None
    same_top: int | None = None
    fault: str | None = None


class GroundingItem(Frozen):
    """One question asked with its own image, with another item's (`other`) and with none, which some models do not take."""

    item: Literal["grounding"] = "grounding"
    id: str
    digest: str
    cluster: str
    other: str
    prompt: str
    accepted: tuple[str, ...]
    said_own: str
    said_other: str
    said_none: str | None
    score_own: float
    score_other: float
    score_none: float | None
    fault: str | None = None


AnyItem = QuestionItem | WindowItem | ImageItem | AdapterItem
_ITEM: TypeAdapter[AnyItem] = TypeAdapter(Annotated[AnyItem, Field(discriminator="item")])


@dataclass(frozen=True)
class Measured:
    """A measurement with its items, by task name."""

    tasks: dict[str, TaskMeasurement]
    items: dict[str, tuple[AnyItem, ...]]
    grounding: Grounding | None = None
    grounding_items: tuple[GroundingItem, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    again: Mapping[str, tuple[AnyItem, ...]] = field(default_factory=lambda: dict[str, tuple[AnyItem, ...]]())
    """Of the original, the items that were asked again."""

    def scored(self, name: str) -> tuple[ScoredItem, ...]:
        """Return the items of a task that are answered, with their scores."""
        return tuple(item for item in self.items[name] if isinstance(item, ScoredItem))

    def questions(self, name: str) -> tuple[QuestionItem, ...]:
        """Return the items of a VQA task."""
        return tuple(item for item in self.items[name] if isinstance(item, QuestionItem))

    def windows(self, name: str) -> tuple[WindowItem, ...]:
        """Return the items of a perplexity task."""
        return tuple(item for item in self.items[name] if isinstance(item, WindowItem))


def items_path(folder: Path, name: str) -> Path:
    """Return where a measurement's folder holds a task's items."""
    return folder / f"items-{name}.parquet"


def again(name: str) -> str:
    """Return what a task's items that are asked again go by; no task has such a name."""
    return f"{name}@again"


def write_items(folder: Path, name: str, items: Sequence[AnyItem | GroundingItem]) -> None:
    """Write a task's items, a row each."""
    from compress.calibration.tables import parquet_of

    write_bytes(items_path(folder, name), parquet_of([item.model_dump() for item in items]))


def write_measurement(folder: Path, measurement: Measurement) -> None:
    """Write `measurement.json`."""
    write_text(folder / MEASUREMENT, measurement.model_dump_json(indent=2) + "\n")


def read_items(folder: Path, name: str) -> tuple[AnyItem, ...]:
    """Read a task's items.

    Raises:
        DataError: there are none, or a row cannot be read; run the measurement again.
    """
    return _read_items(items_path(folder, name), _ITEM)


def read_grounding(folder: Path) -> tuple[GroundingItem, ...]:
    """Read the items that show whether answers depend on images; see `read_items`."""
    return _read_items(items_path(folder, GROUNDING), TypeAdapter(GroundingItem))


def _read_items(path: Path, adapter: TypeAdapter[Item]) -> tuple[Item, ...]:
    from compress.calibration.tables import read_rows

    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure again with --fresh") from error
    items: list[Item] = []
    for number, row in enumerate(rows, 1):
        try:
            items.append(adapter.validate_python(row))
        except ValidationError as error:
            raise DataError(f"{path}: row {number}: no item of a measurement; measure again with --fresh") from error
    return tuple(items)


def read_measured(folder: Path) -> Measured:
    """Read a measurement's folder.

    Raises:
        DataError: a file is missing or damaged; run the measurement again.
    """
    path = folder / MEASUREMENT
    try:
        measurement = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure again with --fresh") from error
    except ValidationError as error:
        raise DataError(f"{path}: no measurement; measure again with --fresh") from error
    names = [task.name for task in measurement.tasks]
    return Measured(
        tasks={task.name: task for task in measurement.tasks},
        items={name: read_items(folder, name) for name in names},
        grounding=measurement.grounding,
        skipped=measurement.skipped,
        grounding_items=read_grounding(folder) if measurement.grounding is not None else (),
        again={task.name: read_items(folder, again(task.name)) for task in measurement.tasks if task.noise is not None},
    )


def check_pairs(
    task: str, original: Sequence[ScoredItem | WindowItem | GroundingItem], artifact: Iterable[tuple[str, str]]
) -> None:
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
