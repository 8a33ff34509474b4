"""Perplexity over non-overlapping windows of the joined text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compress.data.sources import TextSource, source_fields
from compress.errors import DataError
from compress.eval.full_vocabulary import compare_full_vocabulary
from compress.eval.metrics import load_metric
from compress.eval.results import (
    AnyItem,
    Fidelity,
    Metrics,
    PerplexityMetrics,
    TaskMeasurement,
    WindowItem,
    repeat_name,
    write_items,
)
from compress.eval.tasks.task import (
    Task,
    TaskContext,
    fidelity_of,
    original_items,
    score_passages,
    score_twice,
    token_sums,
)
from compress.recipe.schema import Source
from compress.runtimes.runtime import Capability, Passage, Score, Scores

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

# The raw version, as in the quantization papers: the other one has rare words replaced by <unk>.
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


class Perplexity(Task):
    """Exp of the mean negative log-likelihood per token, over windows that do not overlap.

    The documents are joined and tokenized as one text. A window's first token is context and is not scored; the remainder after
    the last full window is dropped.
    """

    task_revision: ClassVar[int] = 2
    figures_type: ClassVar[type[Metrics]] = PerplexityMetrics
    item_type: ClassVar[type[AnyItem]] = WindowItem

    task: Literal["perplexity"]
    dataset: Literal["wikitext", "text"]
    source: Source | None = None
    subset: str | None = None
    split: str = "test"
    revision: str = "main"
    column: str = "text"
    window: int = Field(ge=2)
    """Tokens per window."""

    @classmethod
    def filled_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with the data set's name, and Wikitext's with its place on the hub."""
        if fields.get("dataset") == "wikitext":
            source = {"source": _WIKITEXT[0], "subset": _WIKITEXT[1]} if fields.get("source") is None else {}
            return {"name": "wikitext"} | source | {key: value for key, value in fields.items() if value is not None}
        return {"name": "text", **fields}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source is None:
            raise ValueError("needs source: a text, parquet or JSONL file, or a hub dataset")
        return self

    @property
    def metric_name(self) -> str:
        """The task is its metric."""
        return PerplexityMetrics.metric

    @property
    def needs(self) -> tuple[Capability, ...]:
        """Log-probabilities of given tokens."""
        return (Scores,)

    @property
    def text_tokens(self) -> int:
        """The tokens of a window."""
        return self.window

    @property
    def data(self) -> TextSource:
        """The source of the text."""
        return TextSource.model_construct(**source_fields(self, TextSource))

    def settings(self) -> dict[str, Any]:
        """Return the window, the number of windows, and the task's revision; see `Task.settings`."""
        return {"task": self.task, "revision": self.task_revision, "column": self.column} | self.model_dump(
            include={"name", "window", "samples"}
        )

    def note(self) -> str:
        """Return the windows that the perplexity is measured over."""
        extent = f"the first {self.samples:,} of them" if self.samples else "all of them"
        return (
            f"perplexity per token over windows of {self.window:,} tokens that do not overlap, {extent}, of the joined text; the "
            "first token of each is given"
        )

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the text's documents, read lazily; see `Task.contents`."""
        from compress.data.texts import read_documents

        return (), (document for path in files for document in read_documents(path, self.column))

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Score the text's windows; see `Task.measure`."""
        passages = self.windows(context.files, context.original_checkpoint)
        self.warn_if_fewer(len(passages), "windows", context.progress)
        digests = [_digest(passage.token_ids) for passage in passages]
        original_items(context, self.name, WindowItem, zip((passage.id for passage in passages), digests, strict=True))
        scores = compare_full_vocabulary(context, self.name, passages, score_passages(context, self.name, passages))
        items = _items(scores, digests)
        write_items(context.output_dir, self.name, items)
        metrics = PerplexityMetrics(
            perplexity=load_metric(self.metric_name).aggregate(items),
            window=self.window,
            windows=len(items),
            tokens=sum(item.tokens for item in items),
            failed=sum(item.fault is not None for item in items),
        )
        noise = self._noise(passages, digests, context)
        return TaskMeasurement(name=self.name, metrics=metrics, fidelity=fidelity_of(scores), noise=noise)

    def _noise(self, passages: Sequence[Passage], digests: Sequence[str], context: TaskContext) -> Fidelity | None:
        """Return how much the original's predictions change in a second run, None where none is asked for."""
        repeated = passages[: context.noise_samples]
        if context.original_measurement is not None or not repeated:
            return None
        scores = score_twice(context, self.name, repeated)
        write_items(context.output_dir, repeat_name(self.name), _items(scores, digests[: len(repeated)]))
        return fidelity_of(scores)

    def windows(self, files: Sequence[Path], original: Path) -> list[Passage]:
        """Return the text's windows of `window` token ids by the original's tokenizer.

        Raises:
            DataError: a file cannot be used, or the text is shorter than a window.
            CheckpointError: the original's tokenizer cannot be loaded.
        """
        from compress.data.prompts import load_tokenizer
        from compress.data.texts import SEPARATOR, read_joined
        from compress.data.windows import encoder

        # Joined and tokenized as one, as the papers do (GPTQ, AWQ): per-document windows give other figures, which do not compare.
        text = SEPARATOR.join(read_joined(path, self.column) for path in files)
        # The original's tokenizer for every artifact: perplexities per token compare only over the same tokens.
        (ids,) = encoder(load_tokenizer(original))([text])
        window_count = len(ids) // self.window
        if window_count == 0:
            raise DataError(
                f"task {self.name}: {', '.join(map(str, files))} has {len(ids)} tokens, not one window of {self.window}; take a "
                "longer text or a smaller window"
            )
        return [
            Passage(id=f"window-{number:05d}", token_ids=tuple(ids[number * self.window : (number + 1) * self.window]))
            for number in range(min(window_count, self.samples or window_count))
        ]


def _items(scores: Sequence[Score], digests: Sequence[str]) -> list[WindowItem]:
    return [
        WindowItem(
            id=score.id,
            digest=digest,
            tokens=len(score.negative_log_likelihood),
            fault=score.fault,
            **token_sums(score),
        )
        for score, digest in zip(scores, digests, strict=True)
    ]


def _digest(token_ids: Sequence[int]) -> str:
    # Of the tokens, not the text: another tokenizer version makes other windows of the same text. Little-endian on every machine.
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()
