"""A checkpoint without its bytes: what a stage is given and what it will leave, from headers alone; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from compress.checkpoints.checkpoint import Checkpoint, TensorSpec, text_config
from compress.checkpoints.layouts import KV_SCALES, linear_shape, linear_specs, quantized_linears, unquantized_linears
from compress.checkpoints.output_head import config_with_stated_tie, head_is_tied
from compress.checkpoints.quantization_config import is_readable, quantization_config
from compress.families import Family, within
from compress.numerics.scheme import Scheme

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack")
"""Linears by which an attention that caches keys is known: separate ones, and the fused ones of transformers and of models with
code of their own (InternLM2, Baichuan)."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear [rows, columns] = [out, in]."""

    scheme: Scheme
    rows: int
    columns: int


@dataclass(frozen=True)
class CheckpointSpec:
    """The config, tensors and schemes of a checkpoint, on disk or planned. Two are equal where all of these are."""

    source: str = field(compare=False)  # a planned and a written checkpoint lie in different folders
    """The folder or hub id that messages name."""

    family: Family
    config: Mapping[str, Any]

    tensors: Mapping[str, TensorSpec]
    """Type and shape of each tensor, by its name on disk."""

    quantized: Mapping[str, QuantizedLinear]
    """The quantized linears, by their names on disk without `.weight`."""

    tied: bool
    """Whether the output head is the embedding matrix."""

    unreadable: bool = False
    """Whether the weights are quantized in a format that this package does not read linear by linear."""

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of each quantized linear, by its name on disk."""
        return {name: linear.scheme for name, linear in self.quantized.items()}

    @cached_property
    def weight_bytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The decoder's section of the config with the architecture's defaults."""
        return text_config(self.config)

    @cached_property
    def has_kv_scales(self) -> bool:
        """Whether there are scales with which a runtime caches keys and values as 8-bit floats."""
        return any(name.rpartition(".")[2] in KV_SCALES for name in self.tensors)

    @property
    def config_with_stated_tie(self) -> dict[str, Any]:
        """The config for results of the checkpoint: it says in every section whether the embeddings are tied."""
        return config_with_stated_tie(self.config, self.family, self.tied)

    def shape(self, name: str) -> tuple[int, int]:
        """Return [out, in] of a linear by its name on disk, quantized or not."""
        if linear := self.quantized.get(name):
            return linear.rows, linear.columns
        rows, columns = self.tensors[f"{name}.weight"].shape
        return rows, columns


def spec_of(checkpoint: Checkpoint, family: Family) -> CheckpointSpec:
    """Return the spec of a checkpoint on disk or on a hub.

    Raises:
        CheckpointError: the config describes packed tensors that are not there, or other ones than are.
    """
    schemes = quantized_linears(checkpoint) if is_readable(checkpoint.config) else {}
    return CheckpointSpec(
        source=str(checkpoint.folder),
        family=family,
        config=checkpoint.config,
        tensors={name: TensorSpec(entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()},
        quantized={name: QuantizedLinear(scheme, *linear_shape(checkpoint, name)) for name, scheme in schemes.items()},
        tied=head_is_tied(checkpoint, family),
        unreadable=not is_readable(checkpoint.config),
    )


def quantized_spec(before: CheckpointSpec, schemes: Mapping[str, Scheme], has_kv_scales: bool = False) -> CheckpointSpec:
    """Return the spec after linears were quantized: `schemes` by their names on disk.

    With `has_kv_scales` it gains scales of keys and values. Linears that were quantized before stay as they are.
    """
    tensors = dict(before.tensors)
    added: dict[str, QuantizedLinear] = {}
    for name, scheme in schemes.items():
        # removed first: int8 and FP8 codes come back under the same name with another type
        weight = tensors.pop(f"{name}.weight")
        rows, columns = weight.shape
        added[name] = QuantizedLinear(scheme, rows, columns)
        tensors |= linear_specs(name, (rows, columns), scheme, weight.dtype)
    if has_kv_scales:
        tensors |= {f"{name}.{suffix}": TensorSpec("F32", (1,)) for name in caching_attentions(before) for suffix in KV_SCALES}
    quantized = {**before.quantized, **added}
    spec = replace(before, tensors=tensors, quantized=quantized)
    # of the tensors before: packed ones no longer look like matrices of weights
    ignore = unquantized_linears(before, before.family, quantized)
    all_schemes = {name: linear.scheme for name, linear in quantized.items()}
    settings = quantization_config(all_schemes, ignore, has_kv_scales or before.has_kv_scales)
    return replace(spec, config={**before.config_with_stated_tie, "quantization_config": settings})


def difference(planned: CheckpointSpec, written: CheckpointSpec) -> str | None:
    """Return the first difference between a planned checkpoint and the one on disk; None where they are equal."""
    for name in sorted({*planned.tensors, *written.tensors}):
        if (one := planned.tensors.get(name)) != (other := written.tensors.get(name)):
            return f"{name} was planned as {one or 'missing'} and is {other or 'missing'}"
    for kind in ("quantized", "config", "tied"):
        one, other = getattr(planned, kind), getattr(written, kind)
        if one != other and isinstance(one, Mapping):
            mine, theirs = cast("Mapping[str, Any]", one), cast("Mapping[str, Any]", other)
            key = next(key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key))
            return f"{kind}: {key} was planned as {mine.get(key)!r} and is {theirs.get(key)!r}"
        if one != other:
            return f"{kind} was planned as {one!r} and is {other!r}"
    return None


def caching_attentions(spec: CheckpointSpec) -> list[str]:
    """Return the names on disk of the decoder's attentions that cache keys and values."""
    owners: dict[str, None] = {}
    for name in spec.tensors:
        linear = name.removesuffix(".weight").removesuffix(".weight_packed")
        attention, _, leaf = linear.rpartition(".")
        if leaf in _KEY_PROJECTIONS and within(spec.family.module_name(f"{linear}.weight"), spec.family.blocks):
            owners[attention] = None
    return list(owners)
