"""Load a checkpoint by transformers' own `from_pretrained`: an independent reference for exports.

The exports and the in-process runtime share this package's mapping of tensors to parameters and of tied heads, so that an error
there would be in both. Here transformers decides both.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.utils import logging

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.skeleton import build_skeleton, load_config
from compress.errors import CheckpointError
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import fake_quantize_as_served
from compress.runtimes.unpack import dense_tensors
from compress.untrusted.reading import library_errors


def load_independently(context: OpenContext, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a checkpoint as `from_pretrained` loads it, in evaluation mode, with activations fake-quantized as a runtime does.

    A quantized checkpoint is dequantized first, by `unpack`, which follows the formats' specifications alone.

    Raises:
        CheckpointError: it cannot be read, or transformers finds no weight for a parameter.
    """
    folder, trust_remote_code = context.artifact, context.trust_remote_code
    checkpoint = open_checkpoint(folder)
    # the class alone: names of parameters and ties are what is to be checked, so they are left to transformers
    architecture: Any = type(build_skeleton(folder, dtype, device, trust_remote_code))
    config = load_config(folder, trust_remote_code)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True, "local_files_only": True}
    source: Path | None = folder
    with (
        context.progress.task("load weights into transformers", 1, "model") as advance,
        library_errors(f"{folder}: transformers cannot load it"),
        _without_progress_bars(),
    ):
        if checkpoint.config.get("quantization_config"):
            source, settings["state_dict"] = None, dict(dense_tensors(checkpoint, dtype, device))
        model, loading_info = architecture.from_pretrained(source, **settings)
        advance(1)
    # from_pretrained initializes what it does not find at random, and only warns
    if missing := sorted(cast("set[str]", loading_info["missing_keys"])):
        raise CheckpointError(f"{folder}: transformers finds no weight for {missing[0]}; fetch the checkpoint again")
    fake_quantize_as_served(checkpoint, context.family, cast("nn.Module", model), device)
    return model.to(device).eval()


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Disable transformers' progress bars while the context lasts: the progress is reported here."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
