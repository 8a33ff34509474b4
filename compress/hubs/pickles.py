"""Conversion of pickled weights to safetensors, for recipes that allow them, without executing code in them."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import INDEX, SINGLE, read_config, read_index
from compress.errors import CheckpointError
from compress.families.records import says_tied
from compress.files import disk_errors, write_json
from compress.untrusted.reading import inside, library_errors

if TYPE_CHECKING:
    from torch import Tensor

# transformers' names before safetensors.
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert_pickle(folder: Path, target: Path) -> None:
    """Write the pickled checkpoint in `folder` to `target` as safetensors, shard by shard, with config, tokenizer and processor.

    Only tensors are read (torch's `weights_only`). Tensors that share memory are written separately, except an output head that the
    config ties to the embeddings, which is omitted.

    Raises:
        CheckpointError: a shard is missing, damaged, or has other objects than tensors.
        StoreError: `target` cannot be written.
    """
    config = read_config(folder)
    sharded = (folder / PICKLE_INDEX).is_file()
    shards = sorted(set(read_index(folder / PICKLE_INDEX).values())) if sharded else [PICKLE]
    weight_map, total = dict[str, str](), 0
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        copy_side_files(folder, target)
        shutil.copyfile(inside(folder, folder / "config.json"), target / "config.json")
        for number, shard in enumerate(shards, start=1):
            tensors = _unshare(_load(folder / shard), tied=says_tied(config))
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            _save(tensors, target / name)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    if not inside(path.parent, path).is_file():
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again")
    with library_errors(f"{path}: cannot be read", remedy="fetch the checkpoint again"):
        try:
            # files from before torch 1.6 are no zip archives and cannot be mapped
            # weights_only: unpickling otherwise runs whatever code the file names.
            loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: holds more than tensors, or is damaged, and is not loaded; use a safetensors copy"
            ) from error
    rows = cast("dict[object, object]", loaded) if isinstance(loaded, dict) else {}
    if not rows or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in rows.items()):
        raise CheckpointError(f"{path}: is no table of named tensors; use a safetensors copy of the checkpoint")
    return cast("dict[str, Tensor]", rows)


def _unshare(tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    separate: dict[str, Tensor] = {}
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    for name, tensor in tensors.items():
        # safetensors refuses tensors that share memory.
        shared = storages.count(tensor.untyped_storage().data_ptr()) > 1
        if shared and tied and name.endswith("lm_head.weight"):
            continue
        separate[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return separate


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import torch as safetensors_torch

    temporary = path.with_name(f".{path.name}.part")
    try:
        safetensors_torch.save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
