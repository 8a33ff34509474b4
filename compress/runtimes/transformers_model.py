"""Loading an artifact into a dense transformers model, one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.engine.weights import map_tensor
from compress.errors import CheckpointError, MissingError
from compress.families import Family, family_of
from compress.output_head import head_is_tied
from compress.progress import Progress
from compress.runtimes.activations import round_inputs
from compress.runtimes.kv_cache import SCALES, round_cache
from compress.runtimes.unpack import dense_count, dense_tensors
from compress.skeleton import build_skeleton


def choose_device(wanted: str) -> torch.device:
    """Return the device a recipe's `auto`, `cpu` or `cuda` stands for here.

    Raises:
        MissingError: `cuda` without a usable CUDA device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingError("device: cuda, and torch finds no CUDA device here; set device: auto, or run where there is one")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, artifact: Path, device: torch.device) -> torch.dtype:
    """Return the type to compute in; `auto` is float32 on a CPU, elsewhere the type named in the artifact's config.json."""
    if wanted == "auto" and device.type != "cpu":
        checkpoint = open_checkpoint(artifact)
        sources = (checkpoint.config, checkpoint.text_config)
        named = [source.get(key) for source in sources for key in ("dtype", "torch_dtype")]
        wanted = next((str(name) for name in named if name), "bfloat16")
    return cast("torch.dtype", getattr(torch, "float32" if wanted == "auto" else wanted))


def load_model(
    artifact: Path, dtype: torch.dtype, device: torch.device, progress: Progress, trust_remote_code: bool = False
) -> Any:
    """Return the artifact as a dense transformers model in evaluation mode; inputs that a runtime rounds are rounded in it too.

    Raises:
        CheckpointError: a weight is missing, superfluous, or of another shape than the model's.
    """
    checkpoint = open_checkpoint(artifact)
    family = family_of(checkpoint.config, str(artifact), checkpoint, trust_remote_code)
    model: Any = build_skeleton(artifact, dtype, device, trust_remote_code)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    with progress.task("load weights", dense_count(checkpoint), "tensors") as advance:
        for name, tensor in dense_tensors(checkpoint, dtype, device):
            path, _, leaf = family.module_name(name).rpartition(".")
            if path not in modules:
                raise CheckpointError(f"{artifact}: holds {name}, which this model does not have; fetch or export it again")
            computed = modules[path]._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
            if leaf not in computed:  # old files hold the numbers of the positions too
                _assign(artifact, name, modules[path], leaf, tensor)
            advance(1)
    if head_is_tied(checkpoint, family):
        model.tie_weights()
    for name, parameter in cast("nn.Module", model).named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"{artifact}: holds no weight for {name}; fetch or export it again")
    round_as_served(checkpoint, family, cast("nn.Module", model), device)
    return model


def round_as_served(checkpoint: Checkpoint, family: Family, model: nn.Module, device: torch.device) -> None:
    """Have a dense model of an artifact round inputs, keys and values where a runtime that serves the artifact does."""
    modules = dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))
    round_inputs(checkpoint, family, modules, device)
    cached = [name for name in checkpoint.tensors if name.endswith(SCALES)]
    round_cache(modules, {_module_name(name, family): map_tensor(checkpoint.tensors[name]).to(device) for name in cached})


def _module_name(scale: str, family: Family) -> str:
    """Return the in-memory name of a scale for keys or values, by that of a tensor that its attention has."""
    attention, _, leaf = scale.rpartition(".")
    return f"{family.module_name(f'{attention}.k_proj.weight').removesuffix('.k_proj.weight')}.{leaf}"


def _assign(artifact: Path, name: str, module: nn.Module, leaf: str, tensor: Tensor) -> None:
    current = getattr(module, leaf, None)
    if not isinstance(current, Tensor) or current.shape != tensor.shape:
        has = "no such weight" if not isinstance(current, Tensor) else f"{tuple(current.shape)} there"
        raise CheckpointError(f"{artifact}: {name} has the shape {tuple(tensor.shape)}, the model {has}; config.json does not fit")
    if isinstance(current, nn.Parameter):
        setattr(module, leaf, nn.Parameter(tensor.to(current.dtype), requires_grad=False))
    else:
        setattr(module, leaf, tensor.to(current.dtype))
