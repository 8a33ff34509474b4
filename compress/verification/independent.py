"""The checkpoint as transformers itself loads it: the second opinion that an export is held against.

What an export writes and what the in-process runtime reads are made by one program, which may err twice in the same way: in which
parameter a tensor is, or in whether the output head is the embeddings. Here transformers decides both.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.utils import logging

from compress.checkpoint import open_checkpoint
from compress.errors import CheckpointError
from compress.families import family_of
from compress.progress import Progress
from compress.runtimes.transformers_model import round_as_served
from compress.runtimes.unpack import dense_tensors
from compress.skeleton import build_skeleton, load_config
from compress.untrusted import foreign


def load_independently(
    folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress, trust_remote_code: bool = False
) -> Any:
    """Return a checkpoint as `from_pretrained` loads it, in evaluation mode; inputs that a runtime rounds are rounded in it too.

    Of a quantized one transformers is given the weights that its codes stand for, unpacked from the formats' descriptions alone.

    Raises:
        CheckpointError: it cannot be read, or transformers finds no weight for a part of the model.
    """
    checkpoint = open_checkpoint(folder)
    architecture: Any = type(build_skeleton(folder, dtype, device, trust_remote_code))
    config = load_config(folder, trust_remote_code)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True, "local_files_only": True}
    place: Path | None = folder
    with (
        progress.task("load weights into transformers", 1, "model") as advance,
        foreign(f"{folder}: transformers cannot load it"),
        _without_bars(),
    ):
        if checkpoint.config.get("quantization_config"):
            place, settings["state_dict"] = None, dict(dense_tensors(checkpoint, dtype, device))
        model, found = architecture.from_pretrained(place, **settings)
        advance(1)
    if missing := sorted(cast("set[str]", found["missing_keys"])):
        raise CheckpointError(f"{folder}: transformers finds no weight for {missing[0]}; fetch the checkpoint again")
    family = family_of(checkpoint.config, str(folder), checkpoint, trust_remote_code)
    round_as_served(checkpoint, family, cast("nn.Module", model), device)
    return model.to(device).eval()


@contextmanager
def _without_bars() -> Generator[None]:
    """Keep transformers' own progress bars from the terminal while the block runs; ours tells of the same."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
