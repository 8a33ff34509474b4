"""What vLLM and each of its layouts support, and what needs a GPU; from headers and schemes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from compress.checkpoints.module_names import FUSED
from compress.checkpoints.spec import CheckpointSpec
from compress.families import within
from compress.numerics.scheme import BLOCK, Scheme

Layout = Literal["awq", "gptq", "compressed-tensors"]

_FUSED_IN_CHECKPOINT = {"qkv": 3}
"""Linears that are fused in checkpoints and that vLLM splits: into how many."""

# vLLM's AutoAWQ loader maps 4 bits alone to a kernel's type, and its GPTQ loader symmetric 4 and 8 bits.
_AWQ_BITS = 4
_AWQ_PACK_FACTOR = 8
"""4-bit outputs in a 32-bit word."""

_GPTQ_BITS = (4, 8)
_GPTQ_GROUP_SIZES = (-1, 32, 64, 128)
"""The group sizes of vLLM's GPTQ kernels."""

# `CPUWNA16LinearKernel` (mixed_precision/cpu.py) takes uint4 and uint4b8.
_CPU_BITS = 4
_CPU_TILE = 32
"""The sides of a weight in vLLM's CPU kernel for 4 bits are multiples of this."""

_ALTERNATIVE = "set layout: compressed-tensors"

Reason = Callable[[CheckpointSpec, str, Scheme], str | None]
"""Returns why a linear is not supported, with the remedy; None where it is."""


def faults(layout: Layout, spec: CheckpointSpec) -> list[str]:
    """Return why vLLM, or the layout, does not support a checkpoint, one line each with its remedy."""
    lines = _fused_faults(spec) + _collect(spec, _must_stay_dense)
    if layout == "compressed-tensors":
        return lines + _collect(spec, _zero_points_fill_words, _integer_activations_need_8_bits, _blocks_align_with_fused)
    if not spec.schemes:
        return [f"layout {layout} holds quantized weights, and no stage quantizes any; add a stage such as {layout}, or "
                f"{_ALTERNATIVE}"]  # fmt: skip
    if spec.has_kv_scales:
        lines.append(f"layout {layout} has no place for the scales of keys and values; {_ALTERNATIVE}, or remove kv_cache")
    only_weights = _only_integer_weights(layout)
    if layout == "awq":
        return lines + _collect(spec, only_weights, _awq_bits, _one_group_size(spec, layout), _awq_rows)
    return lines + _collect(
        spec, only_weights, _gptq_bits, _gptq_groups, _one_width(spec), _one_group_size(spec, layout), _gptq_words
    )


def notes(spec: CheckpointSpec) -> list[str]:
    """Return caveats for serving the checkpoint, one line each: vLLM versions that dropped it, what a CPU cannot run."""
    lines: list[str] = []
    if spec.family.served_until:
        lines.append(
            f"vLLM served {spec.family.architecture} up to version {spec.family.served_until} and no later one does: "
            f"serve it with that version, or evaluate it with runtime: transformers"
        )
    return lines + _collect(spec, _needs_a_gpu) + _collect(spec, _requantized)


def _must_stay_dense(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del scheme
    module = spec.family.module_name(f"{name}.weight")
    dense = next((component for component in spec.family.served_unquantized if within(module, component)), None)
    return f"vLLM computes {dense} of this architecture with plain weights alone; leave it out" if dense else None


def _requantized(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del spec
    # A scale per tensor only: a fused layer has one, so vLLM takes the largest and rounds the other shards again.
    if scheme.block_rows != -1 or not any(name.rpartition(".")[2] in fused for fused in FUSED.values()):
        return None
    return (
        "vLLM joins it with others, gives them the largest of their scales and rounds them again where that is not their own; "
        "a scale per output channel is kept as it is"
    )


def _collect(spec: CheckpointSpec, *reasons: Reason) -> list[str]:
    """Return one line per reason, with the first linear's name and the number of others; each linear is in one line."""
    linears: dict[str, list[str]] = {}
    for name, scheme in spec.schemes.items():
        reason = next((text for reason in reasons if (text := reason(spec, name, scheme))), None)
        if reason:
            linears.setdefault(reason, []).append(name)
    return _lines(linears)


def _lines(linears: dict[str, list[str]]) -> list[str]:
    return [f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {reason}" for reason, names in linears.items()]


def _fused_faults(spec: CheckpointSpec) -> list[str]:
    parents: dict[str, list[str]] = {}
    for name in spec.schemes:
        parent, _, leaf = name.rpartition(".")
        for fused in (fused for fused in FUSED.values() if leaf in fused):
            siblings = [f"{parent}.{sibling}" for sibling in fused]
            # Linears of these names need not be fused: an `o_proj` without siblings, or mllama's `q_proj` alone, is no fused layer.
            complete = all(sibling in spec.schemes or f"{sibling}.weight" in spec.tensors for sibling in siblings)
            if complete and len({spec.schemes.get(sibling) for sibling in siblings}) > 1:
                reason = (
                    f"vLLM joins {', '.join(fused)} into one layer, and they are not all quantized alike; "
                    "give them the same bits, group_size and symmetric, or leave all of them out"
                )
                parents.setdefault(reason, [])
                if parent not in parents[reason]:
                    parents[reason].append(parent)
    return _lines(parents)


def _zero_points_fill_words(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    rows, _ = spec.shape(name)
    # compressed-tensors packs zero points along the outputs and pads the last word; vLLM's loader computes their number without
    # rounding up.
    if scheme.symmetric or rows * scheme.bits % 32 == 0:
        return None
    return (
        f"{rows} outputs at {scheme.bits} bits do not fill 32-bit words, and vLLM cannot load such zero points; "
        "set symmetric: true on the stage, or leave the layer out"
    )


def _integer_activations_need_8_bits(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.type == "float" or scheme.activations is None:
        return None
    # The int8 GEMM multiplies by both scales after the sum, which needs one scale per output channel and no zero point of weights.
    if scheme.bits == 8 and scheme.symmetric and scheme.group_size == -1:
        return None
    return (
        "vLLM rounds inputs to integers only beside symmetric weights of 8 bits with one scale per output channel; "
        "set bits: 8, symmetric: true and group_size: -1, or leave activations away"
    )


def _blocks_align_with_fused(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    """A block of 128 rows must not span two of the linears that vLLM fuses."""
    if scheme.block_rows != BLOCK:
        return None
    leaf = name.rpartition(".")[2]
    # A `qkv` of the checkpoint is split into three: each third must be whole blocks.
    rows = spec.shape(name)[0] // _FUSED_IN_CHECKPOINT.get(leaf, 1)
    # The last of the fused linears may end within a block: nothing lies behind it.
    followed = leaf in _FUSED_IN_CHECKPOINT or any(leaf in fused[:-1] for fused in FUSED.values())
    if not followed or rows % BLOCK == 0:
        return None
    return (
        f"vLLM joins it with others, and its {rows} outputs are no whole number of blocks of {BLOCK}; "
        "use a scale per output channel instead of blocks, or leave the layer out"
    )


def _only_integer_weights(layout: Layout) -> Reason:
    def reason(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        if scheme.type == "int" and scheme.activations is None:
            return None
        unsupported = "8-bit floats" if scheme.type == "float" else "rounded activations"
        return f"layout {layout} holds integer weights alone, not {unsupported}; {_ALTERNATIVE}"

    return reason


def _awq_bits(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    return None if scheme.bits == _AWQ_BITS else f"layout awq holds 4 bits, not {scheme.bits}; {_ALTERNATIVE}"


def _awq_rows(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del scheme
    rows, _ = spec.shape(name)
    return (
        f"layout awq holds outputs by eights, not {rows}; {_ALTERNATIVE}, or leave the layer out"
        # A word holds eight neighbouring outputs of one input channel.
        if rows % _AWQ_PACK_FACTOR
        else None
    )


def _gptq_bits(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.bits not in _GPTQ_BITS:
        return f"layout gptq holds 4 or 8 bits, not {scheme.bits}; {_ALTERNATIVE}"
    return (
        None
        if scheme.symmetric
        else f"layout gptq holds symmetric grids alone; set symmetric: true on the stage, or {_ALTERNATIVE}"
    )


def _gptq_groups(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.group_size in _GPTQ_GROUP_SIZES:
        return None
    return (
        f"vLLM loads layout gptq in groups of 32, 64 or 128, or -1, not {scheme.group_size}; set such a group_size, "
        f"or {_ALTERNATIVE}"
    )


def _gptq_words(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    rows, columns = spec.shape(name)
    if rows * scheme.bits % 32 == 0 and columns * scheme.bits % 32 == 0:
        return None
    return (
        f"layout gptq holds inputs and outputs in whole 32-bit words, which {rows} × {columns} at {scheme.bits} bits do not fill; "
        f"{_ALTERNATIVE}, or leave the layer out"
    )


def _one_width(spec: CheckpointSpec) -> Reason:
    # The most common one is taken as meant, so that the message names the few linears that deviate.
    common = Counter(scheme.bits for scheme in spec.schemes.values()).most_common(1)[0][0]

    def reason(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        return (
            None
            if scheme.bits == common
            else f"layout gptq holds one width, {common} here, and not {scheme.bits} too; {_ALTERNATIVE}"
        )

    return reason


def _one_group_size(spec: CheckpointSpec, layout: Layout) -> Reason:
    common = Counter(scheme.group_size for scheme in spec.schemes.values()).most_common(1)[0][0]

    def reason(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        if scheme.group_size == common:
            return None
        return f"layout {layout} holds one group size, {common} here, and not {scheme.group_size} as well; {_ALTERNATIVE}"

    return reason


def _needs_a_gpu(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    if scheme.type == "float" and (scheme.activations == "tensor" or scheme.block_rows == BLOCK):
        unsupported = "blocks" if scheme.block_rows == BLOCK else "fixed scales of inputs"
        return (
            f"vLLM's build for CPUs runs 8-bit floats without {unsupported}, or on processors with AMX: this artifact needs a GPU"
        )
    # int-quantized (W8A8) runs on CPUs in any shape, through oneDNN.
    if scheme.format != "pack-quantized":
        return None
    if scheme.bits != _CPU_BITS:
        return f"vLLM's build for CPUs runs weights of 4 bits, not {scheme.bits}: this artifact needs a GPU"
    rows, columns = spec.shape(name)
    if rows % _CPU_TILE or columns % _CPU_TILE:
        return (
            f"vLLM's build for CPUs runs sides that are multiples of {_CPU_TILE}, not {rows} × {columns}: this artifact needs a GPU"
        )
    return None
