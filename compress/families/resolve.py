"""The choice of the record for a checkpoint; where none fits, a family is derived from the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_config
from compress.errors import CheckpointError
from compress.families.family import Family
from compress.families.records import OTHER_FORMATS, matching_record


def family_of(
    config: Mapping[str, Any], where: str = "config.json", checkpoint: Checkpoint | None = None, trust_remote_code: bool = False
) -> Family:
    """Return the family of a model by its config.json; `where` is the folder, file or hub id for messages.

    Where no record fits, one is derived from the `checkpoint`, if any; this imports torch, and with `trust_remote_code` the
    model's own code.

    Raises:
        CheckpointError: no record fits, and none can be derived.
    """
    family, misfit = matching_record(config)
    if family is not None:
        return family
    # files in an author's own form fit no class of transformers: their message says what to convert
    if checkpoint is not None and (trust_remote_code or config.get("model_type") not in OTHER_FORMATS):
        from compress.engine.derive.derived import derive_family

        return derive_family(checkpoint, f"{where}: {misfit}", trust_remote_code)
    raise CheckpointError(f"{where}: {misfit}")


def family_at(folder: Path, trust_remote_code: bool = False) -> Family:
    """Return the family of the checkpoint in a folder; its weights are read only where no record fits its config.

    A run resolves it once and hands it on: this is for processes that were handed none.

    Raises:
        CheckpointError: no record fits, and none can be derived.
    """
    config = read_config(folder)
    return matching_record(config)[0] or family_of(config, str(folder), open_checkpoint(folder), trust_remote_code)
