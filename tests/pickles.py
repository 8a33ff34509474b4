"""The files of a checkpoint, and the same checkpoint with its weights as pickles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import torch as safetensors_torch


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_pickles(folder: Path, target: Path, shards: Sequence[Sequence[str]]) -> None:
    """Write the checkpoint again with pickled weights, the names of each shard as given."""
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    for name, data in files_of(folder).items():
        if name != "model.safetensors":
            (target / name).write_bytes(data)
    if len(shards) == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return
    weight_map = dict[str, str]()
    for number, names in enumerate(shards):
        torch.save({name: tensors[name] for name in names}, target / f"part-{number}.bin")
        weight_map |= dict.fromkeys(names, f"part-{number}.bin")
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
