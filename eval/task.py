"""What every evaluation task is: a part of a recipe that asks a model something and turns what comes back into figures."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compress.calibration.sets import QuestionSource, RowFilter, TextSource
from compress.errors import CheckpointError
from compress.eval.journal import Journal, score_all
from compress.eval.results import Fidelity, ScoredItem, TaskMeasurement, Unit, again
from compress.eval.statistics import mean_interval
from compress.eval.whole import summarise
from compress.progress import Progress
from compress.runtimes.runtime import Ability, Passage, Reorderable, Score, Session, unscored
from compress.schema import Frozen

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.calibration.texts import Document

FIDELITY_CONFIDENCE = 0.95
_ALL_ROWS = RowFilter()


class Stopping(Protocol):
    """Decides, after each of `looks` parts of a task's items, whether an artifact needs no more of them."""

    @property
    def looks(self) -> int:
        """How many parts there are."""
        ...

    def ends(self, items: int) -> Sequence[int]:
        """Return how many of so many items have been asked by the end of each part."""
        ...

    def settled(self, original: Sequence[ScoredItem], items: Sequence[ScoredItem], look: int) -> bool:
        """Return whether the items so far, the same of the original and of the artifact, settle it after part `look`, from 1."""
        ...


@dataclass(frozen=True)
class TaskContext:
    """What a task is given beside its own fields.

    `session` runs the model that is measured; `original` is the original's checkpoint folder, whose tokenizer and end tokens
    count for every artifact; `files` hold the task's data, in order; items are written to `target`. `against` is the folder
    that measuring the original wrote, None where the original itself is measured. With `stopping`, items are drawn in
    parts until it is settled. Of the original, the first `noise` items are asked twice more, the second time in another order and
    in other batches, to see how much an answer changes by itself.
    """

    session: Session
    original: Path
    files: tuple[Path, ...]
    target: Path
    against: Path | None
    progress: Progress
    logs: Path
    stopping: Stopping | None = None
    noise: int = 0


class Task(Frozen, ABC):
    """One evaluation with its settings; keeps nothing beyond its fields."""

    task: Any
    """The row it stands for in the table of tasks."""

    task_revision: ClassVar[int]
    """Raised whenever the same settings measure something else."""

    asks: ClassVar[bool] = False
    """Whether it asks questions about images and scores the answers."""

    needs_server: ClassVar[bool] = False
    """Whether it asks a server itself, so that the runtime must have one."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    """What reports call it, filled in from what it asks where the recipe does not say; names files, unique in a recipe."""

    @property
    def needs(self) -> Ability:
        """What a model must be able to do for it, and a runtime must offer."""
        return "text"

    @property
    @abstractmethod
    def data(self) -> TextSource | QuestionSource | None:
        """Where its data come from; None where what asks the server reads them by itself."""

    @property
    def rows(self) -> RowFilter:
        """Which rows of its data count."""
        return _ALL_ROWS

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return all that shapes its figures but the data's content, free of paths, as plain JSON values."""

    @abstractmethod
    def note(self) -> str:
        """Return how its figures come about, one sentence for the report."""

    @abstractmethod
    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the questions and the text that are asked, to be compared with what the stages were calibrated on.

        Raises:
            DataError: a file cannot be used.
        """

    @abstractmethod
    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Ask the model, write the items, and return the figures.

        Raises:
            DataError: the data cannot be used, or are not those the original was measured on.
            CheckpointError: the model gives no finite predictions; names the item.
        """


def score_passages(
    context: TaskContext, name: str, passages: Sequence[Passage], against: str | None = None, session: Session | None = None
) -> list[Score]:
    """Score a task's passages: the original's predictions are recorded as `name`, an artifact's compared with that record.

    With `against`, they are compared with what this very measurement recorded under that name. Another `session` of the same model
    may be asked. Where it gives no scores, or nothing was recorded of the original, the scores are empty.

    Raises:
        CheckpointError: the score of a passage is missing or not finite; names it.
        ServerError: the runtime does not answer any more, or not one passage could be scored.
    """
    record = context.target / "record" / name
    theirs = None if context.against is None else context.against / "record" / name
    if against is not None:
        theirs = context.target / "record" / against
    if "scores" not in context.session.offers or (theirs is not None and passages and not theirs.is_dir()):
        return [unscored(passage.id, None, compared=False) for passage in passages]
    journal = Journal(context.target, name, None if theirs is not None else record, theirs)
    scores = score_all(session or context.session, passages, journal, context.progress)
    for score in scores:
        missing = theirs is not None and (score.kl is None or score.same_top is None)
        if missing or not np.isfinite(score.negative_log_likelihood).all():
            raise CheckpointError(_no_number(name, score.id))
        if score.kl is not None and not np.isfinite(score.kl).all():
            raise CheckpointError(_no_number(name, score.id))
    return scores


def score_again(context: TaskContext, name: str, passages: Sequence[Passage]) -> list[Score]:
    """Score passages twice and compare the second time with the first: how far the original's predictions are its own.

    The second time they are asked in another order and in other batches, where it is a server that is asked: one that is asked the
    same in the same way may say the same to the bit, and its numbers still depend on what they are computed with.

    Raises:
        CheckpointError: as `score_passages` does.
    """
    score_passages(context, f"{name}@noise", passages)
    return score_passages(context, again(name), passages, f"{name}@noise", asked_otherwise(context.session))


def asked_otherwise(session: Session) -> Session:
    """Return what asks the same model in another order and in other batches; the session itself where nothing depends on these."""
    return session.reordered() if isinstance(session, Reorderable) else session


def draw_questions(
    files: Sequence[Path], data: QuestionSource, samples: int | None, seed: int, rows: RowFilter = _ALL_ROWS
) -> list[Question]:
    """Return the questions that count of the files, in their order, with `samples` at most so many, drawn with a seed.

    Raises:
        DataError: a file or question cannot be used, or there is none.
    """
    from compress.calibration.questions import count_questions, read_questions

    chosen: set[int] | None = None
    if samples is not None:
        held = count_questions(files, data.columns, rows)
        chosen = set(random.Random(seed).sample(range(held), min(held, samples)))  # noqa: S311 - no secret
    folder = None if data.image_folder is None else Path(data.image_folder)
    return list(read_questions(files, data.columns, chosen, rows, folder))


def flips(original: Sequence[ScoredItem], items: Sequence[ScoredItem]) -> dict[str, int]:
    """Return how many items score less than they did, `lost`, and how many more, `gained`."""
    pairs = [(before.score, after.score) for before, after in zip(original, items, strict=True)]
    return {"lost": sum(after < before for before, after in pairs), "gained": sum(after > before for before, after in pairs)}


def cluster_of(question: Question) -> str:
    """Return what a question shares with those about the same images; its own id where it has none."""
    return digest_text("\n".join(question.image_digests)) if question.images else f"id:{question.id}"


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def warn_of_few(context: TaskContext, name: str, asked: int | None, found: int, what: str) -> None:
    """Tell the user where the data hold fewer items than the recipe asks for; all of them are used."""
    if asked is not None and found < asked:
        context.progress.warn(f"task {name}: the data hold {found:,} {what}, samples asks for {asked:,}; all of them are used")


def _no_number(task: str, item: str) -> str:
    return (
        f"task {task}: item {item}: the model's predictions are not finite; its weights overflow in this runtime's dtype: set "
        "another dtype for the runtime, or a gentler stage"
    )


def total(values: NDArray[np.float64] | NDArray[np.bool_] | None) -> float | None:
    """Return the sum of an item's per-token values, None where there are none."""
    return None if values is None else float(values.sum())


def count(values: NDArray[np.bool_] | None) -> int | None:
    """Return for how many of an item's tokens something holds, None where it was not asked."""
    return None if values is None else int(values.sum())


def fidelity_of(scores: Sequence[Score], unit: Unit = "token") -> Fidelity | None:
    """Summarise how alike the predictions, each of a `unit`, were; None where they were not compared."""
    compared = ((score.kl, score.same_top) for score in scores)
    kept = [(kl, same) for kl, same in compared if kl is not None and same is not None and len(kl)]  # none where an item failed
    if not kept:
        return None
    lower, whole, weights = _whole_of(scores)
    at_least = any(score.at_least for score in scores)
    if at_least and not np.isnan(whole).any():  # every token was drawn: nothing is left to be bounded
        at_least, lower = False, whole
    ends = np.cumsum([len(kl) for kl, _ in kept])
    sums = np.array([part.sum() for part in np.split(lower, ends[:-1])], dtype=np.float64)
    sizes = np.array([len(kl) for kl, _ in kept], dtype=np.float64)
    return Fidelity(
        unit=unit,
        tokens=len(lower),
        kl_mean=float(lower.mean()),
        kl_p99=float(np.quantile(lower, 0.99)),
        kl_interval=_not_negative(mean_interval(sums, sizes, FIDELITY_CONFIDENCE)),
        top1_agreement=float(np.concatenate([same for _, same in kept]).mean()),
        at_least=at_least,
        whole=summarise(lower, whole, weights) if at_least and not np.isnan(whole).all() else None,
    )


def _whole_of(scores: Sequence[Score]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return, over all compared tokens, KL, KL over the whole vocabulary where it was asked (else nan), and the weights."""
    compared = [(score, score.kl) for score in scores if score.kl is not None and len(score.kl)]
    wholes = [np.full(len(kl), np.nan) if score.whole is None else score.whole for score, kl in compared]
    weights = [np.full(len(kl), score.weight) for score, kl in compared]
    return np.concatenate([kl for _, kl in compared]), np.concatenate(wholes), np.concatenate(weights)


def _not_negative(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return an interval of a divergence, which is never below zero."""
    return None if interval is None else (max(0.0, interval[0]), max(0.0, interval[1]))
