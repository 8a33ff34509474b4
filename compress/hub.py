"""Where models and datasets come from: a folder, the Hugging Face hub or ModelScope, each pinned to one state; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from compress.artifact import is_side_file, side_files
from compress.checkpoint import (
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
from compress.limits import limits
from compress.progress import Progress
from compress.schema import is_local

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

Fingerprint = Callable[[Path], str]
"""Returns a file's SHA-256; may remember it."""


@dataclass(frozen=True)
class ModelPin:
    """A model at one state: a folder on this machine, or a hub's repository at a commit."""

    source: str
    hub: Literal["folder", "huggingface", "modelscope"]
    repository: Repository | None = None

    @property
    def pickled(self) -> bool:
        """Whether its weights are only there as a pickle."""
        names = self.names
        return not names & {SINGLE, INDEX} and bool(names & {PICKLE, PICKLE_INDEX})

    @cached_property
    def names(self) -> frozenset[str]:
        """The paths of its files, relative to its root."""
        if self.repository is not None:
            return frozenset(self.repository.by_name)
        folder = Path(self.source)
        return frozenset([*(path.name for path in folder.glob("*") if path.is_file()), *side_files(folder)])

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of its config.json, fetched where it is on a hub.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        return read_config(fetch_metadata(self))

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The names of the files that hold its weights, in order.

        Raises:
            CheckpointError: there are none, or an index names a file that is not there.
        """
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
        """Return one SHA-256 over everything of it that shapes a result: weights, config, tokenizer, processor, code."""
        index = {INDEX, PICKLE_INDEX} if len(self.weights) > 1 else set[str]()
        beside = sorted(name for name in self.names if _is_side(name) or name.endswith(".py") or name in index)
        return self._digest([*beside, *self.weights], fingerprint)

    def side_digest(self, fingerprint: Fingerprint) -> str:
        """Return one SHA-256 over the files that say how text and images enter it."""
        return self._digest(sorted(name for name in self.names if _is_side(name)), fingerprint)

    def describe(self) -> dict[str, str]:
        """Return what a report says of where it came from."""
        if self.repository is None:
            return {"source": self.source, **self.licence}
        kind = "commit" if self.hub == "huggingface" else "files"
        where = {"source": self.source, "hub": self.hub, "revision": self.repository.revision, kind: self.repository.commit}
        return {**where, **self.licence}

    @cached_property
    def licence(self) -> Mapping[str, str]:
        """What its model card says of its licence: `license`, and `license_name` and `license_link` of one that is no usual one.

        Raises:
            CheckpointError: the card leads out of the model's folder, or is too large.
        """
        if CARD not in self.names:
            return {}
        if self.repository is None:
            return read_licence(Path(self.source))
        try:
            return read_licence(_fetch(self, [self.repository.by_name[CARD]], lambda count: None))
        except (MissingError, StoreError):  # a cache that cannot be written holds all but the card: no reason to stop
            return {}

    def _digest(self, names: Sequence[str], fingerprint: Fingerprint) -> str:
        if self.repository is not None:
            files = self.repository.by_name
            return content_digest({name: files[name].content for name in names})
        return content_digest({name: f"sha256:{fingerprint(Path(self.source) / name)}" for name in names})


def resolve_model(source: str, hub: Literal["huggingface", "modelscope"], revision: str) -> ModelPin:
    """Pin a model without fetching its weights; a path is a folder whatever `hub` says.

    Raises:
        CheckpointError: the folder is no checkpoint's.
        MissingError: the hub has no such model or revision, wants a token, or cannot be reached.
    """
    if is_local(source):
        read_config(Path(source))
        return ModelPin(source=source, hub="folder")
    listed = huggingface.list_files("model", source, revision) if hub == "huggingface" else modelscope.list_files(source, revision)
    if _CONFIG not in listed.by_name and ADAPTER in listed.by_name:
        raise CheckpointError(f"{source}: {adapter_message('the model that its ' + ADAPTER + ' names')}")
    if _CONFIG not in listed.by_name:
        raise CheckpointError(f"{source}: holds no {_CONFIG} at revision {revision}; is this a model's repository?")
    return ModelPin(source=source, hub=hub, repository=listed)


def fetch_metadata(pin: ModelPin, *, trust_remote_code: bool = False) -> Path:
    """Fetch a model's small files (config, tokenizer, processor, index; its code where trusted); return the folder they are in.

    Raises:
        MissingError: they cannot be fetched.
    """
    if pin.repository is None:
        return Path(pin.source)
    return _fetch(pin, _small(pin.repository, trust_remote_code), lambda count: None)


def _small(repository: Repository, trust_remote_code: bool) -> list[RemoteFile]:
    """Return what is fetched beside the weights."""
    return [
        file
        for file in repository.files
        if _is_side(file.name) or file.name in {INDEX, PICKLE_INDEX} or (trust_remote_code and file.name.endswith(".py"))
    ]


def fetch_model(pin: ModelPin, progress: Progress, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Path:
    """Fetch what a model needs to be loaded and nothing else; return its folder.

    Python files come only with `trust_remote_code`, pickled weights only with `allow_pickle`.

    Raises:
        CheckpointError: only pickled weights are there and they are not allowed, or a file is missing in the repository.
        MissingError: a file cannot be fetched.
    """
    _refuse_pickle(pin, allow_pickle)
    if pin.repository is None:
        return Path(pin.source)
    fetch_metadata(pin)
    listed = [pin.repository.by_name[name] for name in pin.weights]
    small = _small(pin.repository, trust_remote_code)
    with progress.task(f"fetch {pin.source}", sum(file.size for file in (*small, *listed)), "B") as advance:
        return _fetch(pin, [*small, *listed], advance)


def open_pinned(pin: ModelPin, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Checkpoint | None:
    """Return a model's config and tensor table, read from the headers alone; None where its weights are a pickle that is allowed.

    The tensors' files are where `fetch_model` will put them.

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
    read_range = lru_cache(maxsize=256)(partial(_read_range, pin))
    return checked(Checkpoint(folder=folder, config=pin.config, tensors=tensors, read_range=read_range))


def weights_notes(pin: ModelPin) -> list[str]:
    """Return which of several weights are taken where a model has a single file and an index of others beside it."""
    if not {SINGLE, INDEX} <= pin.names:
        return []
    shards = set(read_index(fetch_metadata(pin) / INDEX).values()) - {SINGLE}
    gone = sorted(shards - pin.names)
    if not shards:
        return []
    others = f"{len(shards)} shards ({INDEX})"
    if gone:
        return [
            f"the weights are {SINGLE}, as transformers reads them; {INDEX} beside it is stale: {gone[0]} is not there. vLLM goes "
            "by the index: remove it"
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
    """Return whether a file belongs to config, tokenizer, processor or chat template, or tells the terms of use."""
    return name == _CONFIG or is_side_file(name)
