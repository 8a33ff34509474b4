"""Tasks of lmms-eval and lm-evaluation-harness, run by these harnesses against the artifact's server."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from compress.checkpoints.artifact import file_digest
from compress.eval.harness import ENVIRONMENTS
from compress.eval.results import AdapterItem, AnyItem, TaskMeasurement
from compress.eval.tasks.task import Task, TaskContext
from compress.recipe.schema import Source
from compress.runtimes.runtime import Capability, Generates, Served

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

SHORT_FORM = r"^(lmms|lm):(.+)$"
"""The short form of such a task in a recipe: `lmms:NAME` or `lm:NAME`."""


def _check_folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError(f"no folder at {value}; name one with the harness's task files")
    return value


class Adapter(Task):
    """A task of lmms-eval (`lmms`) or lm-evaluation-harness (`lm`); short: `lmms:NAME`, `lm:NAME`.

    The harness runs in its own environment and sends requests to the runtime's server, so it needs `runtime: vllm` or `endpoint`.
    It reads its data itself, from the hub or its cache.
    """

    task_revision: ClassVar[int] = 1
    item_type: ClassVar[type[AnyItem]] = AdapterItem

    task: Literal["adapter"]
    harness: Literal["lmms", "lm"]
    benchmark: Annotated[str, Field(pattern=r"^[^\s,/]+$")]
    """The task's name in the harness."""

    metric: str | None = None
    """The metric that is an item's score; None takes the first of the task's metrics that the item has."""

    filter: str | None = None
    """Of lm-eval: the filter whose reading of the answers counts, by default the task's first."""

    fewshot: NonNegativeInt | None = None
    """Replaces the task's number of examples before a question."""

    chat: bool = False
    """Of lm-eval: uses the chat completions API instead of completions, which tasks that compare likelihoods need. lmms-eval always
    uses chat completions."""

    include_path: Annotated[Source, AfterValidator(_check_folder)] | None = None
    """A folder with further task files in the harness's format."""

    concurrency: PositiveInt = 8
    request_seconds: PositiveInt = 600

    @classmethod
    def filled_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with the benchmark's name."""
        return {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", str(fields.get("benchmark", ""))).lstrip("-._"), **fields}

    @model_validator(mode="after")
    def _check_harness(self) -> Self:
        lm_only = {"filter": self.filter is not None, "chat": self.chat}
        for key, is_set in lm_only.items():
            if is_set and self.harness == "lmms":
                raise ValueError(f"{key} belongs to harness: lm; leave it out")
        return self

    @property
    def metric_name(self) -> str:
        """The harness's name of the metric; empty where that is the first that an item has."""
        return self.metric or ""

    @property
    def needs(self) -> tuple[Capability, ...]:
        """Answers, and a server that the harness asks for them."""
        return (Generates, Served)

    @property
    def data(self) -> None:
        """None: the harness reads its data itself."""
        return

    def settings(self) -> dict[str, Any]:
        """Return the harness's task, the options, the harness's version and the digest of `include_path`; see `Task.settings`.

        Raises:
            MissingError: the harness is not installed; the message says how to.
        """
        from compress.workers.environment import require

        # The folder counts by its content (below), not by its path; a timeout shapes no answer.
        fields = self.model_dump(mode="json", exclude={"include_path", "request_seconds"})
        include_digest = None if self.include_path is None else _digest(Path(self.include_path))
        versions = require(ENVIRONMENTS[self.harness]).versions
        return {**fields, "revision": self.task_revision, "versions": versions, "include": include_digest}

    def note(self) -> str:
        """Return the harness, its task and the metric."""
        from compress.workers.environment import find

        harness = ENVIRONMENTS[self.harness]
        environment = find(harness)
        version = f" {environment.versions.get(harness, '')}".rstrip() if environment else ""
        metric = self.metric or "the first of its metrics"
        extent = f", over the first {self.samples:,} items of each of its tasks" if self.samples else ""
        return (
            f"the task {self.benchmark} of {harness}{version}, run by it against the same server; items count by {metric}{extent}"
        )

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return nothing: the harness's questions are not known before it runs."""
        del files
        return (), ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Run the harness and read each item's score; see `Task.measure`.

        Raises:
            UsageError: the runtime has no server.
            RecipeError: the harness has no such task, metric or filter.
            MissingError: the harness is not installed, or its data cannot be fetched.
            ServerError: the server ended, no item was answered, or the harness failed; the message names its log.
            DataError: the items are not those the original was measured on.
        """
        from compress.eval.harness.run import measure

        return measure(self, context)


def expand_short_name(entry: Any) -> Any:
    """Return the task's mapping for the short form `lmms:NAME` or `lm:NAME`; any other entry unchanged."""
    match = re.fullmatch(SHORT_FORM, entry) if isinstance(entry, str) else None
    return entry if match is None else {"task": "adapter", "harness": match[1], "benchmark": match[2]}


def _digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's files and their relative paths, without hidden files and `__pycache__`."""
    rows = [
        f"{path.relative_to(folder).as_posix()} {file_digest(path)}"
        for path in sorted(folder.rglob("*"))
        # Bytecode and editors' files change without the task's changing.
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    ]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
