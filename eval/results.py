"""The stored results of a measurement: metrics per task, and one row per item, so that two models' items can be paired.

Field names are those of `measurement.json` and of the columns of `items-<task>.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from compress.errors import DataError
from compress.eval.metrics import load_metric
from compress.eval.metrics.metric import Metric
from compress.files import write_bytes, write_text
from compress.recipe.schema import Frozen

Item = TypeVar("Item")
Record = TypeVar("Record", bound=Frozen)

MEASUREMENT = "measurement.json"
"""The file of a measurement's metrics, in its folder."""

GROUNDING_ITEMS = "grounding"
"""The name of the file of the visual grounding check's items, in place of a task's."""


Unit = Literal["token", "image"]
"""What one compared distribution belongs to: a token of an answer or text, or an image over all classes or captions."""


class ScoreMetrics(Frozen):
    """The score of a task whose items are scored one by one."""

    judged_by: ClassVar[frozenset[str]] = frozenset({"accuracy", "flips"})
    """The gate's checks that these figures are judged by."""

    task: str
    """The task's name in the table `TASKS`."""

    metric: str
    score: float
    """The mean over all items; an item that failed counts 0."""

    items: int
    failed: int = 0
    binary: bool = True
    """Whether every item's score is 1 (right) or 0 (wrong)."""

    definition_version: int | None = None
    details: Mapping[str, float] = Field(default_factory=lambda: dict[str, float]())
    """Further figures by name, such as F1 or the score of each category."""

    @classmethod
    def of(cls, task: str, metric: str, items: Sequence[ScoredItem], **fields: Any) -> Self:
        """Return the score over a task's items; `fields` are others than the items'."""
        record = load_metric(metric)
        failed = sum(item.fault is not None for item in items)
        fields = {"binary": record.binary} | fields
        return cls(task=task, metric=metric, score=record.aggregate(items), items=len(items), failed=failed, **fields)

    @property
    def figure(self) -> float:
        """The task's main figure."""
        return self.score

    @property
    def count(self) -> int:
        """The number of items that the figure is of."""
        return self.items

    @property
    def record(self) -> Metric:
        """What the metric is, and how it reads."""
        return load_metric(self.metric)


class PerplexityMetrics(Frozen):
    """Perplexity: exp of the mean negative log-likelihood over all scored tokens."""

    judged_by: ClassVar[frozenset[str]] = frozenset({"perplexity"})
    metric: ClassVar[str] = "perplexity"
    binary: ClassVar[bool] = False
    details: ClassVar[Mapping[str, float]] = {}
    """Further figures: none."""

    task: str = "perplexity"
    perplexity: float
    window: int
    """Tokens per window."""

    windows: int
    tokens: int
    failed: int = 0

    @property
    def figure(self) -> float:
        """The task's main figure."""
        return self.perplexity

    @property
    def count(self) -> int:
        """The number of windows that the figure is of."""
        return self.windows

    @property
    def record(self) -> Metric:
        """What the metric is, and how it reads."""
        return load_metric(self.metric)


Metrics = ScoreMetrics | PerplexityMetrics
"""A task's figures: what they are judged by and how they read is asked of them alike."""


class WholeKl(Frozen):
    """KL over the whole vocabulary, estimated for all of a task's tokens from a random sample of them."""

    tokens: int
    """The size of the sample."""

    kl_mean: float
    kl_interval: tuple[float, float] | None
    """Bounds of the mean, each with 95 % confidence; None where the sample is too small."""

    kl_p99_at_most: float | None
    """Upper bound of the 99th percentile, with 95 % confidence; None where the sample is too small."""

    interval_level: float = 0.9
    """The confidence of `kl_interval` as a whole: each bound may miss on its own side, 5 % + 5 %."""


class Fidelity(Frozen):
    """The distance of an artifact's predictions from the original's on the same tokens, in nats of KL(original ‖ artifact).

    Of a task that generates answers, the tokens are those of the original's answers.
    """

    unit: Unit = "token"
    tokens: int
    """The number of compared tokens, or images by `unit`."""

    kl_mean: float
    kl_p99: float
    kl_interval: tuple[float, float] | None
    """Bounds of the mean, each with 95 % confidence, clustered by window or answer; None for a single cluster."""

    top1_agreement: float
    """The share of tokens whose most likely token is the same in both models."""

    at_least: bool = False
    """Whether KL is over the top tokens with the rest merged into one outcome, which bounds the exact KL from below."""

    whole: WholeKl | None = None
    """Where `at_least`: the full-vocabulary KL estimated from a sample; None where the runtime gives no full distributions."""

    interval_level: float = 0.9
    """The confidence of `kl_interval` as a whole."""

    lost: int | None = None
    """Items with a lower score than the original's: right before, wrong now."""

    gained: int | None = None
    """Items with a higher score than the original's."""

    changed: int | None = None
    """Items with another answer after normalization, whatever their score."""


class TaskMeasurement(Frozen):
    """One task's results for one model."""

    name: str
    metrics: Metrics
    fidelity: Fidelity | None = None
    """The distance from the original; None for the original itself."""

    noise: Fidelity | None = None
    """Of the original alone: the distance of a second run in another order and in other batches from the first."""

    look: int | None = None
    """Of group-sequential measurement: the number of the look that decided, from 1."""

    looks: int | None = None
    """The number of planned looks."""


class Grounding(Frozen):
    """Visual grounding: the same questions of a task with their own image, with another question's image, and with none."""

    task: str
    metric: str
    binary: bool
    items: int
    failed: int
    """Items without an answer in one of the three conditions; they count in none of the figures below."""

    score_own: float
    """The mean score with the own image; `score_other` and `score_none` likewise."""

    score_other: float
    score_none: float | None
    changed_other: float
    """The share of answers that differ from the answer with the own image; `changed_none` likewise."""

    changed_none: float | None


class Measurement(Frozen):
    """All tasks' results for one model in one runtime: the content of `measurement.json`."""

    tasks: tuple[TaskMeasurement, ...]
    grounding: Grounding | None = None
    skipped: Mapping[str, str] = Field(default_factory=lambda: dict[str, str]())
    """Tasks that were not measured, and the reason."""


class ScoredItem(Frozen):
    """One item with the model's answer and its score."""

    id: str
    digest: str
    """SHA-256 of the item's content: items of two models are paired only where it is equal."""

    cluster: str
    """Equal for items that are statistically dependent: those about the same images."""

    accepted: tuple[str, ...]
    """The reference answers."""

    said: str
    """The model's answer."""

    score: float
    """The task's metric; of binary metrics 1 is right and 0 wrong."""

    fault: str | None = None
    """Why there is no answer; the score is 0 then."""


class QuestionItem(ScoredItem):
    """One question with the generated answer, and sums over the tokens of the original's answer as this model predicts them."""

    item: Literal["question"] = "question"
    prompt: str
    token_ids: tuple[int, ...]
    """The tokens of this model's answer, with the end token unless it was cut off."""

    tokens: int
    """The number of tokens of the original's answer."""

    nll: float
    """The sum of negative log-likelihoods of the original's answer, in nats."""

    kl: float | None = None
    """The sum of KL(original ‖ this model), in nats; None where nothing was compared."""

    same_top: int | None = None
    """The number of tokens whose most likely token is the same in both models."""


class ImageItem(ScoredItem):
    """One image with the most likely class; `nll` is that of the right class, `kl` is over the distribution of all classes."""

    item: Literal["image"] = "image"
    nll: float
    kl: float | None = None
    same_top: int | None = None


class AdapterItem(ScoredItem):
    """One item of another evaluation harness's task."""

    item: Literal["adapter"] = "adapter"


class WindowItem(Frozen):
    """One window of text: the digest of its token ids, the number of scored tokens, and sums over them as in `QuestionItem`."""

    item: Literal["window"] = "window"
    id: str
    digest: str
    tokens: int
    nll: float
    kl: float | None = None
    same_top: int | None = None
    fault: str | None = None


class GroundingItem(Frozen):
    """One question with its own image, with another item's (`other` is its id) and with none, which some models refuse."""

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
class ItemizedMeasurement:
    """A measurement with its items, by task; read from its folder by `read_measurement`."""

    tasks: dict[str, TaskMeasurement]
    items: dict[str, tuple[AnyItem, ...]]
    grounding: Grounding | None = None
    grounding_items: tuple[GroundingItem, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    repeated_items: Mapping[str, tuple[AnyItem, ...]] = field(default_factory=lambda: dict[str, tuple[AnyItem, ...]]())
    """Of the original, the items of the second run."""

    def judged_by(self, name: str) -> frozenset[str]:
        """Return the gate's checks that a task is judged by."""
        return checks_judged(type(self.tasks[name].metrics), type(self.items[name][0]))

    def scored(self, name: str) -> tuple[ScoredItem, ...]:
        """Return the items of a task with scores."""
        return tuple(item for item in self.items[name] if isinstance(item, ScoredItem))

    def questions(self, name: str) -> tuple[QuestionItem, ...]:
        """Return the items of a VQA task."""
        return tuple(item for item in self.items[name] if isinstance(item, QuestionItem))

    def windows(self, name: str) -> tuple[WindowItem, ...]:
        """Return the items of a perplexity task."""
        return tuple(item for item in self.items[name] if isinstance(item, WindowItem))


def checks_judged(figures: type[Metrics], item: type[AnyItem]) -> frozenset[str]:
    """Return the gate's checks that such figures are judged by; fidelity is one where items hold the model's predictions."""
    return figures.judged_by | ({"fidelity"} if "kl" in item.model_fields else set[str]())


def items_path(folder: Path, name: str) -> Path:
    """Return the path of a task's items in a measurement's folder."""
    return folder / f"items-{name}.parquet"


def repeat_name(name: str) -> str:
    """Return the name of a task's second run; no task can have it, for `@` is not allowed in names."""
    return f"{name}@again"


def write_items(folder: Path, name: str, items: Sequence[AnyItem | GroundingItem]) -> None:
    """Write a task's items as parquet, a row each."""
    from compress.data.tables import parquet_of

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
    """Read the items of the visual grounding check; see `read_items`."""
    return _read_items(items_path(folder, GROUNDING_ITEMS), TypeAdapter(GroundingItem))


def _read_items(path: Path, adapter: TypeAdapter[Item]) -> tuple[Item, ...]:
    from compress.data.tables import read_rows

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


def read_record(path: Path, record: type[Record], noun: str) -> Record:
    """Read a JSON file of results.

    Raises:
        DataError: it is missing or damaged; run the measurement again.
    """
    try:
        return record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure again with --fresh") from error
    except ValidationError as error:
        raise DataError(f"{path}: no {noun}; measure again with --fresh") from error


def read_measurement(folder: Path) -> ItemizedMeasurement:
    """Read a measurement's folder.

    Raises:
        DataError: a file is missing or damaged; run the measurement again.
    """
    measurement = read_record(folder / MEASUREMENT, Measurement, "measurement")
    names = [task.name for task in measurement.tasks]
    return ItemizedMeasurement(
        tasks={task.name: task for task in measurement.tasks},
        items={name: read_items(folder, name) for name in names},
        grounding=measurement.grounding,
        skipped=measurement.skipped,
        grounding_items=read_grounding(folder) if measurement.grounding is not None else (),
        repeated_items={
            task.name: read_items(folder, repeat_name(task.name)) for task in measurement.tasks if task.noise is not None
        },
    )


def check_pairs(
    task: str, original: Sequence[ScoredItem | WindowItem | GroundingItem], artifact: Iterable[tuple[str, str]]
) -> None:
    """Check that both models were measured on the same items in the same order; `artifact` gives each item's id and digest.

    Raises:
        DataError: they differ; names the first item that does, or is missing on one side.
    """
    before = [(item.id, item.digest) for item in original]
    after = list(artifact)
    # Not strict: the first item that differs says more than the lengths, which are compared below.
    for (original_id, original_digest), (artifact_id, artifact_digest) in zip(before, after, strict=False):
        if original_id != artifact_id or original_digest != artifact_digest:
            difference = (
                f"item {artifact_id} has another content"
                if original_id == artifact_id
                else f"item {artifact_id} stands where {original_id} was"
            )
            raise DataError(f"task {task}: {difference} when the original was measured; measure the original again with --fresh")
    if len(before) != len(after):
        raise DataError(
            f"task {task}: {len(after)} items, and {len(before)} when the original was measured; measure the original again with "
            "--fresh"
        )
