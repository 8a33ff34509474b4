"""Datasets of the Hugging Face hub: the files of a split, fetched only as far as needed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

from compress.data.json_rows import read_json_rows
from compress.data.tables import parquet_rows
from compress.errors import DataError, MissingError
from compress.hubs import huggingface
from compress.hubs.repository import RemoteFile, Repository, content_digest
from compress.progress import Progress
from compress.untrusted.limits import limits
from compress.untrusted.reading import read_bytes
from compress.untrusted.yaml import YamlError, parse_yaml

# No loading scripts: a dataset's own Python is never run.
READABLE = (".parquet", ".jsonl", ".json", ".txt")
"""The formats of data files that can be read."""

CONVERTED = "refs/convert/parquet"
"""The branch in which the hub converts every dataset's `main` to parquet."""

Enough = Callable[[Sequence[Path]], bool]
"""Returns whether the files fetched so far have enough samples."""


@dataclass(frozen=True)
class DatasetPin:
    """The files of one split of a dataset at one commit, in order."""

    repository: Repository
    subset: str | None
    split: str
    files: tuple[RemoteFile, ...]

    @cached_property
    def digest(self) -> str:
        """One SHA-256 for the content of all its files."""
        return content_digest({file.name: file.content for file in self.files})

    @property
    def label(self) -> str:
        """The dataset and its commit, as in samples' origins."""
        return f"{self.repository.source}@{self.repository.commit[:12]}"


def resolve_dataset(source: str, subset: str | None, split: str, revision: str) -> DatasetPin:
    """Find the files of a split: by the dataset's card, else by the usual file names, else in the hub's parquet branch.

    Raises:
        MissingError: the hub has no such dataset, subset or split (the message lists them), wants a token, or cannot be reached.
    """
    repository = huggingface.list_files("dataset", source, revision)
    # The card first, as the hub's own loader reads it; file names are what is left where it says nothing.
    configs = _card_configs(repository)
    files = _by_card(repository, configs, subset, split) or _by_name(repository, subset, split)
    if not files and revision == "main" and _has_converted(configs, subset):
        converted = _converted(source)
        files = _by_name(converted, subset, split) if converted else []
        repository = converted if converted and files else repository
    if not files:
        requested = f"split {split!r} of subset {subset!r}" if subset else f"split {split!r}"
        raise MissingError(
            f"{source}: has no parquet or JSONL files for {requested} at revision {revision}; "
            f"there are: {_available(repository, configs)}"
        )
    return DatasetPin(repository=repository, subset=subset, split=split, files=tuple(sorted(files, key=lambda file: file.name)))


def fetch_dataset_files(pin: DatasetPin, enough: Enough | int | None, progress: Progress) -> list[Path]:
    """Fetch the split's files in order until they have enough samples, and return their paths.

    `enough` is a number of rows, or a function of the files so far (such as `enough_rows`); None fetches all.

    Raises:
        MissingError: a file cannot be fetched.
    """
    satisfied = enough if callable(enough) else enough_rows(enough)
    paths = list[Path]()
    for file in pin.files:
        with progress.task(f"fetch {pin.repository.source}/{file.name}", file.size, "B") as advance:
            # File by file: 128 calibration samples need one of hundreds of shards.
            paths.append(huggingface.fetch(pin.repository, [file], advance) / file.name)
        if satisfied(paths):
            break
    return paths


def enough_rows(rows: int | None) -> Callable[[Sequence[Path]], bool]:
    """Return a test whether files have at least so many rows; False for None, which needs all files."""

    def are_enough(paths: Sequence[Path]) -> bool:
        return rows is not None and sum(_row_count(path) for path in paths) >= rows

    return are_enough


def _row_count(path: Path) -> int:
    if path.suffix == ".parquet":
        return parquet_rows(path)
    return len(read_json_rows(path))


def cached_files(pin: DatasetPin) -> list[Path] | None:
    """Return the paths of the split's files, None where the cache does not have all of them; fetches nothing."""
    paths = [huggingface.cached(pin.repository, file) for file in pin.files]
    cached_paths = [path for path in paths if path is not None]
    return cached_paths if len(cached_paths) == len(paths) else None


def _card_configs(repository: Repository) -> list[dict[str, Any]]:
    """Return the `configs` of a dataset card's YAML header; empty where it has none, or is unreadable."""
    card = repository.by_name.get("README.md")
    if card is None:
        return []
    folder = huggingface.fetch(repository, [card], lambda count: None)
    text = read_bytes(folder / card.name, limits().json_bytes, DataError, root=folder).decode("utf-8", "replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        data: object = parse_yaml(header.group(1)).data if header else None
    except YamlError:
        return []
    configs: object = cast("dict[str, object]", data).get("configs") if isinstance(data, dict) else None
    rows = cast("list[object]", configs) if isinstance(configs, list) else []
    return [cast("dict[str, Any]", row) for row in rows if isinstance(row, dict) and "data_files" in row]


def _by_card(repository: Repository, configs: list[dict[str, Any]], subset: str | None, split: str) -> list[RemoteFile]:
    config = _choose_config(configs, subset)
    patterns = [pattern for name, pattern in _patterns(config) if name == split] if config else []
    return [
        file
        for file in repository.files
        if file.name.endswith(READABLE) and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
    ]


def _choose_config(configs: list[dict[str, Any]], subset: str | None) -> dict[str, Any] | None:
    if subset is not None:
        return next((config for config in configs if str(config.get("config_name", "default")) == subset), None)
    if len(configs) == 1:
        return configs[0]
    return next((config for config in configs if config.get("default") or config.get("config_name") == "default"), None)


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the split and file pattern of each of a config's `data_files`, in any of their forms."""
    data_files: object = config["data_files"]
    folder = str(config.get("data_dir") or "").strip("/")
    entries = cast("list[object]", data_files if isinstance(data_files, list) else [data_files])
    for entry in entries:
        fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {"split": "train", "path": entry}
        pairs = [(fields["split"], fields.get("path"))] if "split" in fields else list(fields.items())
        for name, paths in pairs:
            for path in cast("list[object]", paths if isinstance(paths, list) else [paths]):
                # fnmatch has no "**": its "*" already crosses slashes.
                pattern = str(path).removeprefix("./").replace("**/", "*")
                yield str(name), f"{folder}/{pattern}" if folder else pattern


def _by_name(repository: Repository, subset: str | None, split: str) -> list[RemoteFile]:
    """Return a split's files by the usual names: SUBSET/SPLIT-*.parquet, SUBSET/SPLIT/*.parquet, data/SPLIT-*.parquet, …"""
    folders = [subset, f"data/{subset}"] if subset else []
    if subset is None:
        subsets = {PurePosixPath(file.name).parts[0] for file in repository.files if file.name.count("/") == 2}
        folders += sorted(subsets) if repository.revision == CONVERTED and len(subsets) == 1 else []
    if subset in {None, "default"}:
        folders += ["data", "", "default"]
    for folder in folders:
        start = re.escape(f"{folder}/") if folder else ""
        for suffix in ("parquet", "jsonl"):
            name = re.compile(rf"{start}{re.escape(split)}([-_.][^/]*)?(/[^/]+)?\.{suffix}")
            files = [file for file in repository.files if name.fullmatch(file.name)]
            if files:
                return files
    return []


def _has_converted(configs: list[dict[str, Any]], subset: str | None) -> bool:
    """Return whether the hub's parquet branch may have the subset: not where the card lists other subsets only."""
    return not configs or _choose_config(configs, subset) is not None


def _converted(source: str) -> Repository | None:
    try:
        return huggingface.list_files("dataset", source, CONVERTED)
    except MissingError:
        return None


def _available(repository: Repository, configs: list[dict[str, Any]]) -> str:
    if configs:
        splits = {str(config.get("config_name", "default")): sorted({name for name, _ in _patterns(config)}) for config in configs}
        return "; ".join(f"subset {name} with {', '.join(names)}" for name, names in splits.items())
    names = [file.name for file in repository.files if not file.name.startswith(".")]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more files" if len(names) > 20 else "") or "no files at all"
