"""The pinned data of calibration sets and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.data.questions import source_digest
from compress.data.sources import QuestionSource, TextSource
from compress.hubs.datasets import Enough
from compress.hubs.hub import DatasetPin, fetch_dataset_files, resolve_dataset
from compress.pipeline.steps.step import digest_of
from compress.pipeline.store import Store
from compress.progress import Progress
from compress.recipe.schema import is_local


@dataclass(frozen=True)
class DataPin:
    """The pinned data of a calibration set or task: a local file, or a hub dataset's commit and files."""

    digest: str
    """The digest of the content."""

    path: Path | None
    """The local file; None for a hub dataset."""

    remote: DatasetPin | None
    """The hub dataset; None for a local file."""

    label: str = ""
    """The name of the hub dataset; empty for a local file."""

    def files(self, progress: Progress, enough: Enough | None = None) -> tuple[Path, ...]:
        """Return the local files, fetched from a hub where they are not cached; no more than are `enough`."""
        if self.path is not None:
            return (self.path,)
        assert self.remote is not None
        return tuple(fetch_dataset_files(self.remote, enough, progress))


def pin_data(data: TextSource | QuestionSource, store: Store) -> DataPin:
    """Return the pinned data of a set or task.

    Raises:
        DataError, MissingError: they cannot be read.
    """
    if is_local(data.source):
        path = Path(data.source)
        questions = data if isinstance(data, QuestionSource) else None
        columns, folder = (questions.columns, questions.image_folder) if questions else (None, None)
        content = source_digest(path, columns, store.fingerprint, Path(folder) if folder else None)
        digest = digest_of(path.suffix, content)  # the suffix decides how it is read
        return DataPin(digest=digest, path=path, remote=None)
    remote = resolve_dataset(data.source, data.subset, data.split, data.revision)
    return DataPin(digest=remote.digest, path=None, remote=remote, label=remote.label)
