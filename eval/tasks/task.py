"""The base class of evaluation tasks, and what they share: scoring passages, drawing samples, summarising per-token KL."""

from __future__ import annotations

import hashlib
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from compress.data.sources import QuestionSource, RowFilter, TextSource
from compress.errors import CheckpointError
from compress.eval import TASKS
from compress.eval.full_vocabulary import estimate_full_kl
from compress.eval.journal import Journal, score_all
from compress.eval.results import (
    AnyItem,
    Fidelity,
    Metrics,
    ScoredItem,
    ScoreMetrics,
    TaskMeasurement,
    Unit,
    WindowItem,
    check_pairs,
    checks_judged,
    read_items,
    repeat_name,
)
from compress.eval.statistics.estimates import mean_interval
from compress.progress import Progress
from compress.recipe.schema import Frozen, load_row
from compress.runtimes.runtime import Capability, Generates, Passage, Score, Scores, Served, Session, unscored

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

Item = TypeVar("Item", bound=ScoredItem | WindowItem)

FIDELITY_CONFIDENCE = 0.95
"""Each bound of the mean KL holds with it, so that both make a 90 % interval: `Fidelity.interval_level` says so in reports."""

_ALL_ROWS = RowFilter()
"""The filter that every row passes."""


class StoppingRule(Protocol):
    """A group-sequential stopping rule: after each interim look at an artifact's items it says whether more are needed."""

    @property
    def looks(self) -> int:
        """The number of looks, the last of which is at all items."""
        ...

    def cumulative_items(self, items: int) -> Sequence[int]:
        """Return, for a sample of `items`, how many of them have been measured by each look."""
        ...

    def is_decided(self, original: Sequence[ScoredItem], artifact: Sequence[ScoredItem], look: int) -> bool:
        """Return whether the paired items so far decide the verdict at look number `look`, counted from 1."""
        ...


@dataclass(frozen=True)
class TaskContext:
    """The model, data and folders of one task's measurement."""

    session: Session
    """The loaded model that is measured."""

    original_checkpoint: Path
    """The original's checkpoint folder: its tokenizer and end tokens count for every artifact."""

    files: tuple[Path, ...]
    """The task's data files, in order."""

    output_dir: Path
    """The measurement's folder, where items, journal and record are written."""

    original_measurement: Path | None
    """The folder that measuring the original wrote; None where the original itself is measured."""

    progress: Progress
    logs: Path
    """The folder for the logs of harnesses that run in a process of their own."""

    stopping: StoppingRule | None = None
    """With it, items are measured look by look until the verdict is decided; None measures all of them."""

    noise_samples: int = 0
    """Of the original, this many items are asked again twice, the second time in another order and in other batches: how much its
    answers change between runs is the noise floor of every comparison."""


class Task(Frozen, ABC):
    """One evaluation of a recipe; its fields are the recipe's keys, and it has no state beyond them."""

    task: Any
    """The task's name in the `TASKS` table."""

    task_revision: ClassVar[int]
    """Part of the cache key; raised whenever the same settings give other figures."""

    figures_type: ClassVar[type[Metrics]] = ScoreMetrics
    """What its figures are, which tells by which of the gate's checks they are judged."""

    item_type: ClassVar[type[AnyItem]]
    """What its items are, which tells whether fidelity to the original can be judged."""

    asks: ClassVar[bool] = False
    """Whether it is a `QuestionTask`: asks questions about images and scores the answers."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    """The name in reports and of its files, unique in a recipe; the default is the definition's or data set's name."""

    samples: PositiveInt | None = None
    """At most so many items, None takes all. Questions and images are drawn at random with `seed`, windows of a text are its first,
    and so are the items of another harness, of each task of a group."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return cls.filled_in(cast("dict[str, Any]", data)) if isinstance(data, dict) else data

    @classmethod
    @abstractmethod
    def filled_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe's fields with defaults that depend on others, such as the name."""

    @classmethod
    def judged_by(cls) -> frozenset[str]:
        """Return the gate's checks for which it gives figures."""
        return checks_judged(cls.figures_type, cls.item_type)

    @property
    @abstractmethod
    def metric_name(self) -> str:
        """The name of its main figure: a row of `METRICS`, or another harness's own."""

    @property
    def needs(self) -> tuple[Capability, ...]:
        """What a session of the model must be able to do."""
        return (Generates,)

    @property
    @abstractmethod
    def data(self) -> TextSource | QuestionSource | None:
        """The source of the data; None where another harness reads its data itself."""

    @property
    def text_tokens(self) -> int:
        """How many tokens the longest text has that it scores without a prompt; 0 where it scores none."""
        return 0

    @property
    def rows(self) -> RowFilter:
        """The filter on the rows of the data."""
        return _ALL_ROWS

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything but the data's content that shapes the figures, as JSON values without paths: part of the cache key."""

    @abstractmethod
    def note(self) -> str:
        """Return how the figures are measured, one sentence for the report."""

    @abstractmethod
    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the questions and documents of the task, for the check of overlap with the calibration data.

        Raises:
            DataError: a file cannot be used.
        """

    @abstractmethod
    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Measure the model, write the items, and return the figures.

        Raises:
            DataError: the data cannot be used, or are not those the original was measured on.
            CheckpointError: the model gives no finite predictions; names the item.
        """

    def warn_if_fewer(self, available: int, noun: str, progress: Progress) -> None:
        """Warn where the data hold fewer items than `samples`; all of them are used."""
        if self.samples is not None and available < self.samples:
            progress.warn(
                f"task {self.name}: the data hold {available:,} {noun}, samples asks for {self.samples:,}; all of them are used"
            )


def kinds_judged_by(check: str) -> list[str]:
    """Return the kinds of task that a check of the gate judges."""
    return [name for name in TASKS if check in cast("type[Task]", load_row(TASKS, name)).judged_by()]


def score_passages(
    context: TaskContext, name: str, passages: Sequence[Passage], against: str | None = None, session: Scores | None = None
) -> list[Score]:
    """Score a task's passages: the original's predictions are recorded as `name`, an artifact's are compared with that record.

    With `against`, the reference is what this same measurement recorded under that name. `session` may be another session of the
    same model. Where the runtime gives no log-probabilities, or the original has no record, the scores are empty.

    Raises:
        CheckpointError: the score of a passage is missing or not finite; names it.
        ServerError: the runtime does not answer any more, or not one passage could be scored.
    """
    record = context.output_dir / "record" / name
    reference = None if context.original_measurement is None else context.original_measurement / "record" / name
    if against is not None:
        reference = context.output_dir / "record" / against
    # A server may have lost its token endpoints since: then there is nothing to compare, and answers are still measured.
    if not isinstance(context.session, Scores) or (reference is not None and passages and not reference.is_dir()):
        return [unscored(passage.id, None, compared=False) for passage in passages]
    journal = Journal(context.output_dir, name, None if reference is not None else record, reference)
    scores = score_all(session or context.session, passages, journal, context.progress)
    for score in scores:
        uncompared = reference is not None and (score.kl is None or score.same_top is None)
        if uncompared or not np.isfinite(score.negative_log_likelihood).all():
            raise CheckpointError(_not_finite_message(name, score.id))
        if score.kl is not None and not np.isfinite(score.kl).all():
            raise CheckpointError(_not_finite_message(name, score.id))
    return scores


def score_twice(context: TaskContext, name: str, passages: Sequence[Passage]) -> list[Score]:
    """Score passages twice and compare the second run with the first: the noise floor of the original's predictions.

    A server gets the second run in another order and in other batches: the same requests in the same order may give bit-identical
    logits although these depend on the batch that a request is computed in.

    Raises:
        CheckpointError: as `score_passages` does.
    """
    # Recorded anew: the first measurement's record is in chunks of all items, and a record is read for the same passages.
    score_passages(context, f"{name}@noise", passages)
    return score_passages(context, repeat_name(name), passages, f"{name}@noise", _reordered_scores(context))


def reordered_session(session: Session) -> Session:
    """Return a session that sends requests in another order and in other batches; itself where neither changes the results."""
    return session.reordered() if isinstance(session, Served) else session


def _reordered_scores(context: TaskContext) -> Scores | None:
    """Return a reordered session; None where it gives no scores, of which then there are none the first time either."""
    session = reordered_session(context.session)
    return session if isinstance(session, Scores) else None


def draw_questions(
    files: Sequence[Path], data: QuestionSource, samples: int | None, seed: int, rows: RowFilter = _ALL_ROWS
) -> list[Question]:
    """Return the files' questions that pass the row filter, in order; with `samples`, at most so many, drawn at random by `seed`.

    Raises:
        DataError: a file or question cannot be used, or there is none.
    """
    from compress.data.questions import open_questions

    questions, indices = open_questions(files, data.columns, rows), None
    if samples is not None:
        available = len(questions)
        # By position: drawing from the data themselves would read every image first.
        indices = set(random.Random(seed).sample(range(available), min(available, samples)))  # noqa: S311 - no secret
    folder = None if data.image_folder is None else Path(data.image_folder)
    return list(questions.read(indices, folder))


def original_items(context: TaskContext, name: str, item_type: type[Item], digests: Iterable[tuple[str, str]]) -> list[Item] | None:
    """Return the original's items of a task, whose ids and digests must be `digests`; None where the original is measured.

    Raises:
        DataError: they cannot be read, or are of other content.
    """
    if context.original_measurement is None:
        return None
    items = [item for item in read_items(context.original_measurement, name) if isinstance(item, item_type)]
    check_pairs(name, items, digests)
    return items


def compare_answers(
    fidelity: Fidelity,
    original: Sequence[ScoredItem],
    items: Sequence[ScoredItem],
    same: Callable[[str, str], bool] = operator.eq,
) -> Fidelity:
    """Return the fidelity with the numbers of items that score less than the original's, score more, and have another answer."""
    pairs = list(zip(original, items, strict=True))
    counts = {
        "lost": sum(new.score < old.score for old, new in pairs),
        "gained": sum(new.score > old.score for old, new in pairs),
        "changed": sum(not same(old.said, new.said) for old, new in pairs),
    }
    return fidelity.model_copy(update=counts)


def cluster_of(question: Question) -> str:
    """Return the cluster id of a question: questions about the same images share it; without images it is the question's own."""
    # By the images' content: two rows with the same picture under different names are dependent as well.
    return digest_text("\n".join(question.image_digests)) if question.images else f"id:{question.id}"


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _not_finite_message(task: str, item: str) -> str:
    return (
        f"task {task}: item {item}: the model's predictions are not finite; its weights overflow in this runtime's dtype: set "
        "another dtype for the runtime, or a gentler stage"
    )


def token_sums(score: Score) -> dict[str, Any]:
    """Return the sums over an item's tokens, by the fields that hold them; those of a comparison are None without one."""
    return {
        "nll": float(score.negative_log_likelihood.sum()),
        "kl": None if score.kl is None else float(score.kl.sum()),
        "same_top": None if score.same_top is None else int(score.same_top.sum()),
    }


def fidelity_of(scores: Sequence[Score], unit: Unit = "token") -> Fidelity | None:
    """Summarise the predictions' KL and top-1 agreement over all tokens (or images, by `unit`); None where nothing was compared."""
    pairs = ((score.kl, score.same_top) for score in scores)
    compared = [(kl, same) for kl, same in pairs if kl is not None and same is not None and len(kl)]  # empty where an item failed
    if not compared:
        return None
    kls, full_kls, weights = _token_kls(scores)
    lower_bound = any(score.at_least for score in scores)
    if lower_bound and not np.isnan(full_kls).any():  # every token was compared over the full vocabulary: KL is exact
        lower_bound, kls = False, full_kls
    ends = np.cumsum([len(kl) for kl, _ in compared])
    sums = np.array([chunk.sum() for chunk in np.split(kls, ends[:-1])], dtype=np.float64)
    sizes = np.array([len(kl) for kl, _ in compared], dtype=np.float64)
    return Fidelity(
        unit=unit,
        tokens=len(kls),
        kl_mean=float(kls.mean()),
        kl_p99=float(np.quantile(kls, 0.99)),
        # Clustered by window or answer: neighbouring tokens share their context, and with it their divergence.
        kl_interval=_clip_at_zero(mean_interval(sums, sizes, FIDELITY_CONFIDENCE)),
        top1_agreement=float(np.concatenate([same for _, same in compared]).mean()),
        at_least=lower_bound,
        whole=estimate_full_kl(kls, full_kls, weights) if lower_bound and not np.isnan(full_kls).all() else None,
    )


def _token_kls(scores: Sequence[Score]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return for all compared tokens: KL, full-vocabulary KL (nan where it was not sampled), and the sampling weights."""
    compared = [(score, score.kl) for score in scores if score.kl is not None and len(score.kl)]
    full_kls = [np.full(len(kl), np.nan) if score.whole is None else score.whole for score, kl in compared]
    weights = [np.full(len(kl), score.weight) for score, kl in compared]
    return np.concatenate([kl for _, kl in compared]), np.concatenate(full_kls), np.concatenate(weights)


def _clip_at_zero(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the interval with its bounds clipped at zero: a divergence is never negative."""
    return None if interval is None else (max(0.0, interval[0]), max(0.0, interval[1]))
