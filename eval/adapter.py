"""Tasks of other harnesses, lmms-eval and lm-evaluation-harness, run by them against the server that serves the artifact."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from compress.artifact import file_digest
from compress.eval.results import TaskMeasurement
from compress.eval.task import Task, TaskContext
from compress.schema import Source

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.calibration.texts import Document

ENVIRONMENTS = {"lmms": "lmms-eval", "lm": "lm-eval"}
"""What each harness's environment is installed as."""

SHORT = r"^(lmms|lm):(.+)$"
"""How a recipe's list of tasks names one of these by its name alone."""


def _folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError(f"no folder at {value}; name one with the harness's task files")
    return value


class Adapter(Task):
    """A task of lmms-eval (`lmms`) or lm-evaluation-harness (`lm`) by the name that it has there; short: `lmms:NAME`, `lm:NAME`.

    The harness runs in its own environment and asks the server that the runtime runs, so it needs `runtime: vllm` or `endpoint`. It
    reads its data by itself, from the hub or its cache; `include_path` names a folder with further task files of its kind.
    An item's score is its own value of `metric`; left out, of the first of the task's metrics that the item has. `filter` is which
    reading of an answer counts where lm-eval's task has several, the first unless said. `samples` takes so many items, the first
    ones (of each, where it is a group of tasks); `fewshot` replaces the number of examples that precede a question. lm-eval asks by
    completions, which tasks that compare likelihoods need, or with `chat` in the model's chat format; lmms-eval always in that.
    """

    task_revision: ClassVar[int] = 1
    needs_server: ClassVar[bool] = True

    task: Literal["adapter"]
    harness: Literal["lmms", "lm"]
    benchmark: Annotated[str, Field(pattern=r"^[^\s,/]+$")]
    metric: str | None = None
    filter: str | None = None
    samples: PositiveInt | None = None
    fewshot: NonNegativeInt | None = None
    chat: bool = False
    include_path: Annotated[Source, AfterValidator(_folder)] | None = None
    concurrency: PositiveInt = 8
    request_seconds: PositiveInt = 600

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        return {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", str(given.get("benchmark", ""))).lstrip("-._"), **given}

    @model_validator(mode="after")
    def _check_harness(self) -> Self:
        own = {"filter": self.filter is not None, "chat": self.chat}
        for key, given in own.items():
            if given and self.harness == "lmms":
                raise ValueError(f"{key} belongs to harness: lm; leave it out")
        return self

    @property
    def data(self) -> None:
        """None: the harness reads its data itself."""
        return

    def settings(self) -> dict[str, Any]:
        """Return the task's name there, its options, the harness's version and the content of `include_path`.

        Raises:
            MissingError: the harness is not installed; the message says how to.
        """
        from compress.runtimes.environment import require

        own = self.model_dump(mode="json", exclude={"include_path", "request_seconds"})
        folder = None if self.include_path is None else _digest(Path(self.include_path))
        versions = require(ENVIRONMENTS[self.harness]).versions
        return {**own, "revision": self.task_revision, "versions": versions, "include": folder}

    def note(self) -> str:
        """Return whose task it is, and what its score is."""
        from compress.runtimes.environment import find

        harness = ENVIRONMENTS[self.harness]
        found = find(harness)
        version = f" {found.versions.get(harness, '')}".rstrip() if found else ""
        metric = self.metric or "the first of its metrics"
        taken = f", over the first {self.samples:,} items of each of its tasks" if self.samples else ""
        return f"the task {self.benchmark} of {harness}{version}, run by it against the same server; items count by {metric}{taken}"

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return nothing: what the harness asks is not known before it asks."""
        del files
        return (), ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Run the harness and take in each item's score; see `Task.measure`.

        Raises:
            UsageError: the runtime has no server.
            RecipeError: the harness has no such task, metric or filter.
            MissingError: the harness is not installed, or its data are not to be had.
            ServerError: the server ended, no item was answered, or the harness failed; the message names its log.
            DataError: the items are not those the original was measured on.
        """
        from compress.eval.adapter_run import measure

        return measure(self, context)


def expand_short_name(entry: Any) -> Any:
    """Return the table that `lmms:NAME` or `lm:NAME` stands for; anything else as it is."""
    found = re.fullmatch(SHORT, entry) if isinstance(entry, str) else None
    return entry if found is None else {"task": "adapter", "harness": found[1], "benchmark": found[2]}


def _digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's files, by their names below it; hidden ones and what Python compiles are left out."""
    rows = [
        f"{path.relative_to(folder).as_posix()} {file_digest(path)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
