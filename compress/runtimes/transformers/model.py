"""Load an artifact into a dense transformers model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.output_head import head_is_tied
from compress.checkpoints.quantization_config import caches_as_fp8
from compress.checkpoints.skeleton import build_skeleton
from compress.engine.weights import map_tensor
from compress.errors import CheckpointError, MissingError
from compress.families import Family
from compress.runtimes.activations import fake_quantize_inputs
from compress.runtimes.kv_cache import SCALES, fake_quantize_cache
from compress.runtimes.runtime import OpenContext
from compress.runtimes.unpack import dense_count, dense_tensors


def choose_device(setting: str) -> torch.device:
    """Return the device for a recipe's `auto`, `cpu` or `cuda` on this machine.

    Raises:
        MissingError: `cuda` without a usable CUDA device.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise MissingError("device: cuda, and torch finds no CUDA device here; set device: auto, or run where there is one")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(setting: str, artifact: Path, device: torch.device) -> torch.dtype:
    """Return the type to compute in; `auto` is float32 on a CPU, elsewhere the type named in the artifact's config.json."""
    if setting == "auto" and device.type != "cpu":
        checkpoint = open_checkpoint(artifact)
        sources = (checkpoint.config, checkpoint.text_config)
        dtypes = [source.get(key) for source in sources for key in ("dtype", "torch_dtype")]
        # transformers 5 writes `dtype`, earlier versions `torch_dtype`; many composite configs give it in text_config alone.
        setting = next((str(name) for name in dtypes if name), "bfloat16")
    # float32 on CPUs: bfloat16 is emulated on many of them, and its rounding would be part of every comparison.
    return cast("torch.dtype", getattr(torch, "float32" if setting == "auto" else setting))


def load_model(context: OpenContext, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the artifact as a dense transformers model in evaluation mode, with activations fake-quantized as a runtime does.

    Raises:
        CheckpointError: a weight is missing, unexpected, or has another shape than the model's.
    """
    artifact, family = context.artifact, context.family
    checkpoint = open_checkpoint(artifact)
    model: Any = build_skeleton(artifact, dtype, device, context.trust_remote_code)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    with context.progress.task("load weights", dense_count(checkpoint), "tensors") as advance:
        for name, tensor in dense_tensors(checkpoint, dtype, device):
            path, _, leaf = family.module_name(name).rpartition(".")
            if path not in modules:
                raise CheckpointError(f"{artifact}: holds {name}, which this model does not have; fetch or export it again")
            derived = modules[path]._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
            if leaf not in derived:  # old checkpoints have `position_ids` buffers too
                _assign(artifact, name, modules[path], leaf, tensor)
            advance(1)
    # After loading: the head is then the embeddings' own parameter, not a second copy.
    if head_is_tied(checkpoint, family):
        model.tie_weights()
    for name, parameter in cast("nn.Module", model).named_parameters():
        # A parameter that no tensor was assigned to would compute nothing on the meta device, far from its cause.
        if parameter.is_meta:
            raise CheckpointError(f"{artifact}: holds no weight for {name}; fetch or export it again")
    fake_quantize_as_served(checkpoint, family, cast("nn.Module", model), device)
    return model


def fake_quantize_as_served(checkpoint: Checkpoint, family: Family, model: nn.Module, device: torch.device) -> None:
    """Fake-quantize a dense model's input activations, keys and values wherever a serving runtime quantizes them.

    Raises:
        CheckpointError: keys and values are quantized in another way than as FP8.
    """
    modules = dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))
    fake_quantize_inputs(checkpoint, family, modules, device)
    scales = [name for name in checkpoint.tensors if name.endswith(SCALES)]
    if scales and not caches_as_fp8(checkpoint.config.get("quantization_config") or {}):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: its kv_cache_scheme is not FP8 with a static scale per tensor, the only one that is "
            "computed here; evaluate it with runtime: vllm"
        )
    fake_quantize_cache(modules, {_module_name(name, family): map_tensor(checkpoint.tensors[name]).to(device) for name in scales})


def _module_name(scale: str, family: Family) -> str:
    """Return the in-memory name of a scale of keys or values, derived from that of its attention's `k_proj`."""
    attention, _, leaf = scale.rpartition(".")
    return f"{family.module_name(f'{attention}.k_proj.weight').removesuffix('.k_proj.weight')}.{leaf}"


def _assign(artifact: Path, name: str, module: nn.Module, leaf: str, tensor: Tensor) -> None:
    current = getattr(module, leaf, None)
    if not isinstance(current, Tensor) or current.shape != tensor.shape:
        expected = "no such weight" if not isinstance(current, Tensor) else f"{tuple(current.shape)} there"
        raise CheckpointError(
            f"{artifact}: {name} has the shape {tuple(tensor.shape)}, the model {expected}; config.json does not fit"
        )
    if isinstance(current, nn.Parameter):
        # To the module's own type: some models keep single modules in float32.
        setattr(module, leaf, nn.Parameter(tensor.to(current.dtype), requires_grad=False))
    else:
        setattr(module, leaf, tensor.to(current.dtype))
