"""A transformers model without its weights: parameters on the meta device, everything that is computed from the config real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from compress.errors import CheckpointError

_AUTO_CONFIG: Any = AutoConfig
_AUTO_MODEL: Any = AutoModelForImageTextToText


def build_skeleton(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the dense model that a checkpoint's config.json describes, in evaluation mode, its parameters still without memory.

    Buffers that no checkpoint holds, such as the rotary frequencies, are computed on `device`, in the type the model gives them.

    Raises:
        CheckpointError: transformers knows no such model.
    """
    config = load_config(folder, trust_remote_code)
    try:
        with torch.device("meta"):
            model = _AUTO_MODEL.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot build this model ({error}); fetch the file again"
        ) from error
    initialise = model._init_weights  # the hook by which every architecture fills its own buffers
    for module in cast("torch.nn.Module", model).modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in lost:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if lost:
            with torch.no_grad():
                initialise(module)
    return cast("PreTrainedModel", model.eval())


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return transformers' config object of a checkpoint, without what it says of quantization.

    Raises:
        CheckpointError: transformers knows no such model.
    """
    try:
        config = _AUTO_CONFIG.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/config.json: transformers cannot read it ({error}); fetch the file again") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
