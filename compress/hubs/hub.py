"""Sources of models and datasets: a folder, the Hugging Face hub or ModelScope, each pinned to one state; without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from compress.checkpoints.artifact import is_side_file, side_files
from compress.checkpoints.checkpoint import (
    ADAPTER,
    INDEX,
    SINGLE,
    Checkpoint,
    TensorEntry,
    adapter_message,
    check_names,
    checked,
    open_checkpoint,
    parse_header,
    read_config,
    read_index,
)
from compress.errors import CheckpointError, MissingError, StoreError
from compress.hubs import huggingface, modelscope
from compress.hubs.card import CARD, read_licence
from compress.hubs.datasets import DatasetPin, fetch_dataset_files, resolve_dataset
from compress.hubs.pickles import PICKLE, PICKLE_INDEX, convert_pickle
from compress.hubs.repository import RemoteFile, Repository, content_digest
from compress.progress import Progress
from compress.recipe.schema import is_local
from compress.untrusted.limits import limits

__all__ = [
    "DatasetPin",
    "ModelPin",
    "convert_pickle",
    "fetch_dataset_files",
    "fetch_metadata",
    "fetch_model",
    "open_pinned",
    "resolve_dataset",
    "resolve_model",
]

_CONFIG = "config.json"
_FIRST_READ = 1 << 16
"""Bytes that are read of a remote safetensors file at first; most headers fit, others need a second request. The first eight bytes
are the header's length."""

Fingerprint = Callable[[Path], str]
"""Returns a file's SHA-256, possibly from a cache."""


@dataclass(frozen=True)
class ModelPin:
    """A model at one state: a folder on this machine, or a hub's repository at a commit."""

    source: str
    hub: Literal["folder", "huggingface", "modelscope"]
    repository: Repository | None = None

    @property
    def pickled(self) -> bool:
        """Whether it has pickled weights only."""
        names = self.names
        return not names & {SINGLE, INDEX} and bool(names & {PICKLE, PICKLE_INDEX})

    @cached_property
    def names(self) -> frozenset[str]:
        """The paths of its files, relative to its folder or repository."""
        if self.repository is not None:
            return frozenset(self.repository.by_name)
        folder = Path(self.source)
        return frozenset([*(path.name for path in folder.glob("*") if path.is_file()), *side_files(folder)])

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of its config.json, fetched from a hub where needed.

        Raises:
            CheckpointError: it is missing, or cannot be read.
        """
        return read_config(fetch_metadata(self))

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The names of its weight files, in order.

        Raises:
            CheckpointError: there are none, or an index names a missing file.
        """
        # The single file before the index, as transformers chooses where a repository has both.
        if SINGLE in self.names:
            return (SINGLE,)
        if not self.pickled and INDEX not in self.names:
            raise CheckpointError(f"{self.source}: holds no {SINGLE} and no {INDEX}; is this a model's repository?")
        if self.pickled and PICKLE_INDEX not in self.names:
            return (PICKLE,)
        index = fetch_metadata(self) / (PICKLE_INDEX if self.pickled else INDEX)
        shards = tuple(sorted(set(read_index(index).values())))
        for shard in shards:
            if shard not in self.names:
                raise CheckpointError(
                    f"{self.source}: {index.name} names {shard}, which is not there; use another revision or copy"
                )
        return shards

    def digest(self, fingerprint: Fingerprint) -> str:
        """Return one SHA-256 over everything that shapes a result: weights, config, tokenizer, processor, code."""
        index = {INDEX, PICKLE_INDEX} if len(self.weights) > 1 else set[str]()
        # The index only of several shards: a single file is read without it, and a stale one beside it must not change the key.
        others = sorted(name for name in self.names if _is_side(name) or name.endswith(".py") or name in index)
        return self._digest([*others, *self.weights], fingerprint)

    def side_digest(self, fingerprint: Fingerprint) -> str:
        """Return one SHA-256 over config, tokenizer, processor, chat template and terms of use."""
        return self._digest(sorted(name for name in self.names if _is_side(name)), fingerprint)

    def describe(self) -> dict[str, str]:
        """Return the model's provenance, as in a report."""
        if self.repository is None:
            return {"source": self.source, **self.licence}
        kind = "commit" if self.hub == "huggingface" else "files"
        provenance = {"source": self.source, "hub": self.hub, "revision": self.repository.revision, kind: self.repository.commit}
        return {**provenance, **self.licence}

    @cached_property
    def licence(self) -> Mapping[str, str]:
        """Its licence by its model card: `license`, and `license_name` and `license_link` of an uncommon one.

        Raises:
            CheckpointError: the card leads out of the model's folder, or is too large.
        """
        if CARD not in self.names:
            return {}
        if self.repository is None:
            return read_licence(Path(self.source))
        try:
            return read_licence(_fetch(self, [self.repository.by_name[CARD]], lambda count: None))
        except (MissingError, StoreError):  # a read-only cache without the card is no reason to stop
            return {}

    def _digest(self, names: Sequence[str], fingerprint: Fingerprint) -> str:
        if self.repository is not None:
            files = self.repository.by_name
            return content_digest({name: files[name].content for name in names})
        return content_digest({name: f"sha256:{fingerprint(Path(self.source) / name)}" for name in names})


def resolve_model(source: str, hub: Literal["huggingface", "modelscope"], revision: str) -> ModelPin:
    """Pin a model without fetching its weights; a local path is a folder, whatever `hub` is.

    Raises:
        CheckpointError: the folder or repository is no checkpoint.
        MissingError: the hub has no such model or revision, wants a token, or cannot be reached.
    """
    if is_local(source):
        read_config(Path(source))
        return ModelPin(source=source, hub="folder")
    repository = (
        huggingface.list_files("model", source, revision) if hub == "huggingface" else modelscope.list_files(source, revision)
    )
    if _CONFIG not in repository.by_name and ADAPTER in repository.by_name:
        raise CheckpointError(f"{source}: {adapter_message('the model that its ' + ADAPTER + ' names')}")
    if _CONFIG not in repository.by_name:
        raise CheckpointError(f"{source}: holds no {_CONFIG} at revision {revision}; is this a model's repository?")
    return ModelPin(source=source, hub=hub, repository=repository)


def fetch_metadata(pin: ModelPin, *, trust_remote_code: bool = False) -> Path:
    """Fetch a model's small files (config, tokenizer, processor, index; its code where trusted) and return their folder.

    Raises:
        MissingError: they cannot be fetched.
    """
    if pin.repository is None:
        return Path(pin.source)
    return _fetch(pin, _small_files(pin.repository, trust_remote_code), lambda count: None)


def _small_files(repository: Repository, trust_remote_code: bool) -> list[RemoteFile]:
    """Return the files that are fetched beside the weights."""
    return [
        file
        for file in repository.files
        if _is_side(file.name) or file.name in {INDEX, PICKLE_INDEX} or (trust_remote_code and file.name.endswith(".py"))
    ]


def fetch_model(pin: ModelPin, progress: Progress, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """Fetch the files that loading a model needs, and return its folder.

    Python files are fetched only with `trust_remote_code`, pickled weights only with `allow_pickle`.

    Raises:
        CheckpointError: it has only pickled weights and they are not allowed, or a file is missing in the repository.
        MissingError: a file cannot be fetched.
    """
    _refuse_pickle(pin, allow_pickle)
    if pin.repository is None:
        return Path(pin.source)
    # Before the weights: a gated or broken repository fails within seconds.
    fetch_metadata(pin)
    weights = [pin.repository.by_name[name] for name in pin.weights]
    small = _small_files(pin.repository, trust_remote_code)
    with progress.task(f"fetch {pin.source}", sum(file.size for file in (*small, *weights)), "B") as advance:
        return _fetch(pin, [*small, *weights], advance)


def open_pinned(pin: ModelPin, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Checkpoint | None:
    """Return a model's config and tensor table, read from the headers alone; None where its weights are an allowed pickle.

    The tensors' files have the paths that `fetch_model` will fetch them to.

    Raises:
        CheckpointError: the weights are a pickle and not allowed, or a header is damaged.
        MissingError: the hub cannot be read.
    """
    _refuse_pickle(pin, allow_pickle)
    if pin.pickled:
        return None
    if pin.repository is None:
        return open_checkpoint(Path(pin.source))
    folder = fetch_metadata(pin, trust_remote_code=trust_remote_code)
    tensors: dict[str, TensorEntry] = {}
    headers = {shard: _remote_header(pin, folder, shard) for shard in pin.weights}
    if pin.weights == (SINGLE,):
        tensors = headers[SINGLE]
    else:
        for name, shard in read_index(folder / INDEX).items():
            if name not in headers[shard]:
                raise CheckpointError(
                    f"{pin.source}: {name} is said to be in {shard}, which does not hold it; use another revision"
                )
            tensors[name] = headers[shard][name]
    check_names(pin.source, tensors)
    # A plan asks for the same few bytes more than once (tied heads, scales): each would be a request.
    read_range = lru_cache(maxsize=256)(partial(_read_range, pin))
    return checked(Checkpoint(folder=folder, config=pin.config, tensors=tensors, read_range=read_range))


def weights_notes(pin: ModelPin) -> list[str]:
    """Return notes on a model that has both a single weight file and an index of shards."""
    if not {SINGLE, INDEX} <= pin.names:
        return []
    shards = set(read_index(fetch_metadata(pin) / INDEX).values()) - {SINGLE}
    missing = sorted(shards - pin.names)
    if not shards:
        return []
    others = f"{len(shards)} shards ({INDEX})"
    if missing:
        return [
            f"the weights are {SINGLE}, as transformers reads them; {INDEX} beside it is stale: {missing[0]} is not there. vLLM "
            "goes by the index: remove it"
        ]
    return [
        f"there are weights twice: {SINGLE}, and {others}. {SINGLE} is taken, as by transformers; vLLM goes by the index and takes "
        f"the shards of the original: remove those that are not meant"
    ]


def _remote_header(pin: ModelPin, folder: Path, name: str) -> dict[str, TensorEntry]:
    """Read one safetensors file's tensor table from its first bytes."""
    size = cast("Repository", pin.repository).by_name[name].size
    start = _read_range(pin, name, 0, min(_FIRST_READ, size))
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < length <= min(size, limits().json_bytes):
        start += _read_range(pin, name, len(start), length)
    return parse_header(folder / name, start, size)


def _read_range(pin: ModelPin, name: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` up to `end`."""
    read = huggingface.read_range if pin.hub == "huggingface" else modelscope.read_range
    return read(cast("Repository", pin.repository), name, start, end)


def _fetch(pin: ModelPin, files: Sequence[RemoteFile], report: Callable[[int], None]) -> Path:
    fetch = huggingface.fetch if pin.hub == "huggingface" else modelscope.fetch
    return fetch(cast("Repository", pin.repository), files, report)


def _refuse_pickle(pin: ModelPin, allow_pickle: bool) -> None:
    if pin.pickled and not allow_pickle:
        raise CheckpointError(
            f"{pin.source}: holds a pickle checkpoint, which can run code when loaded; set model.allow_pickle: true in the recipe "
            "if you trust its author, or use a safetensors copy"
        )


def _is_side(name: str) -> bool:
    """Return whether a file is config, tokenizer, processor, chat template or terms of use."""
    return name == _CONFIG or is_side_file(name)
