"""A transformers model without its weights: parameters on the meta device, everything that is computed from the config real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers import __version__ as transformers_version

from compress.checkpoints.artifact import check_side_files
from compress.checkpoints.checkpoint import read_config
from compress.errors import CheckpointError
from compress.untrusted.limits import limits
from compress.untrusted.reading import library_errors

_AUTO_CONFIG: Any = AutoConfig
_GENERATIVE: Any = AutoModelForImageTextToText
_PLAIN: Any = AutoModel
_WRITING: Any = AutoModelForCausalLM


def build_skeleton(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the dense model that a checkpoint's config.json describes, in evaluation mode, its parameters still without memory.

    Buffers that no checkpoint holds, such as the rotary frequencies, are computed on `device`, in the type the model gives them.

    Raises:
        CheckpointError: transformers knows no such model.
    """
    config = load_config(folder, trust_remote_code)
    with library_errors(f"{folder}/config.json: transformers cannot build this model"):
        # parameters without memory: a model of any size is built in the time that its Python takes
        with torch.device("meta"):
            model = _class_for(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        # before they are filled: config.json alone decides how large these are
        _check_buffers(model, folder)
        _keep_precise(model, dtype)
        _fill_buffers(model, model, device)
        return cast("PreTrainedModel", model.eval())


def _check_buffers(model: torch.nn.Module, folder: Path) -> None:
    """Check the size of what is computed from the config alone before it is computed."""
    # persistent buffers are in the checkpoint, and get their values from there
    held = set(model.state_dict())
    size = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in held)
    if size > limits().buffer_bytes:
        raise CheckpointError(
            f"{folder}/config.json: a model of these sizes computes {size:,} bytes beside its weights "
            f"({limits().set_by('buffer_bytes')}); fetch the file again"
        )


def _fill_buffers(module: torch.nn.Module, model: Any, device: torch.device) -> None:
    """Compute the buffers that were created without memory, by the `_init_weights` of the innermost model that contains them."""
    for child in module.children():
        _fill_buffers(child, child if isinstance(child, PreTrainedModel) else model, device)
    lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for name in lost:
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
    if lost:
        with torch.no_grad():
            # transformers' own hook for what `from_pretrained` finds in no file; the weights stay on the meta device
            model._init_weights(module)  # pyright: ignore[reportPrivateUsage]


def _class_for(config: Any) -> Any:
    """Return what builds the model of a config: one that writes text, or the architecture's only one (CLIP)."""
    # a model with code of its own is in no mapping: its config names the classes
    own: dict[str, Any] = getattr(config, "auto_map", None) or {}
    if type(config) in _GENERATIVE._model_mapping or "AutoModelForImageTextToText" in own:
        return _GENERATIVE
    return _WRITING if "AutoModelForCausalLM" in own else _PLAIN


def _keep_precise(model: Any, dtype: torch.dtype) -> None:
    """Give the modules that their author keeps in float32 that type, as transformers does when it loads a model."""
    # transformers keeps the strict ones in float32 under both half types, the others only under float16, whose range is short
    kept: set[str] = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, parameter in cast("torch.nn.Module", model).named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(torch.float32)


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return transformers' config object of a checkpoint, without its `quantization_config`.

    Raises:
        CheckpointError: transformers knows no such model.
    """
    check_side_files(folder)
    remedy = "fetch the file again, or install a version that can"
    with library_errors(f"{folder}/config.json: transformers cannot read it", remedy=remedy):
        try:
            config = _AUTO_CONFIG.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, ValueError) as error:
            if why := _unsupported(folder, error):
                raise CheckpointError(why) from error
            raise
    if hasattr(config, "quantization_config"):
        # `from_pretrained` would ask for the quantizer's library and expect codes; here weights arrive dequantized
        del config.quantization_config
    return config


def _unsupported(folder: Path, error: Exception) -> str:
    """Return what to do where transformers has no such architecture, or only by the model's own code; empty for other errors."""
    config = read_config(folder)
    if config.get("auto_map") and "trust_remote_code" in str(error):
        return (
            f"{folder}: the model brings its own Python code; set model.trust_remote_code: true in the recipe if you trust its "
            "author, or use a model whose classes are in transformers"
        )
    if "does not recognize this architecture" in str(error):
        return (
            f"{folder}/config.json: transformers {transformers_version} has no model_type {config.get('model_type')!r}; use "
            "another model, or its authors' repository with their Python files and model.trust_remote_code: true"
        )
    return ""
