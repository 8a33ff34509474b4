"""What vLLM and each of its layouts can hold, and what of it only some machines run; read from headers and schemes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from compress.export.format import ExportSpec
from compress.families import within
from compress.layouts import linear_shape
from compress.module_names import FUSED
from compress.numerics.scheme import BLOCK, Scheme

Layout = Literal["awq", "gptq", "compressed-tensors"]

_JOINED = {"qkv": 3}
"""Linears that checkpoints hold as one and vLLM takes apart again: into how many."""

_AWQ_BITS = 4
_AWQ_COLUMNS = 8
_GPTQ_BITS = (4, 8)
_GPTQ_GROUPS = (-1, 32, 64, 128)
_CPU_BITS = 4
_CPU_TILE = 32
_OTHERWISE = "set layout: compressed-tensors"

Reason = Callable[[ExportSpec, str, Scheme], str | None]
"""Says why a linear cannot be held, and what to do; None where it can."""


def faults(layout: Layout, spec: ExportSpec) -> list[str]:
    """Return why vLLM, or the layout, cannot hold a checkpoint, one line each with its remedy."""
    found = _fused_faults(spec) + _collect(spec, _stays_plain)
    if layout == "compressed-tensors":
        return found + _collect(spec, _zero_points_fill_words, _inputs_go_with_8_bits, _blocks_fit_joined)
    if not spec.schemes:
        return [f"layout {layout} holds quantized weights, and no stage quantizes any; add a stage such as {layout}, or "
                f"{_OTHERWISE}"]  # fmt: skip
    if spec.kv_cache:
        found.append(f"layout {layout} has no place for the scales of keys and values; {_OTHERWISE}, or leave kv_cache away")
    only_weights = _only_integer_weights(layout)
    if layout == "awq":
        return found + _collect(spec, only_weights, _awq_bits, _one_group_size(spec, layout), _awq_rows)
    return found + _collect(
        spec, only_weights, _gptq_bits, _gptq_groups, _one_width(spec), _one_group_size(spec, layout), _gptq_words
    )


def notes(spec: ExportSpec) -> list[str]:
    """Return what one should know before serving the checkpoint, one line each: which vLLM still has it, what a CPU cannot run."""
    lines: list[str] = []
    if spec.family.served_until:
        lines.append(
            f"vLLM served {spec.family.architecture} up to version {spec.family.served_until} and no later one does: "
            f"serve it with that version, or evaluate it with runtime: transformers"
        )
    return lines + _collect(spec, _needs_a_gpu) + _collect(spec, _rounded_again)


def _stays_plain(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del scheme
    module = spec.family.module_name(f"{name}.weight")
    plain = next((part for part in spec.family.served_plain if within(module, part)), None)
    return f"vLLM computes {plain} of this architecture with plain weights alone; leave it out" if plain else None


def _rounded_again(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del spec
    if scheme.block_rows != -1 or not any(name.rpartition(".")[2] in parts for parts in FUSED.values()):
        return None
    return (
        "vLLM joins it with others, gives them the largest of their scales and rounds them again where that is not their own; "
        "a scale per output channel is kept as it is"
    )


def _collect(spec: ExportSpec, *reasons: Reason) -> list[str]:
    """Return one line per reason, which names the first linear it holds for and counts the others; each linear is in one line."""
    found: dict[str, list[str]] = {}
    for name, scheme in spec.schemes.items():
        reason = next((text for reason in reasons if (text := reason(spec, name, scheme))), None)
        if reason:
            found.setdefault(reason, []).append(name)
    return _lines(found)


def _lines(found: dict[str, list[str]]) -> list[str]:
    return [f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {reason}" for reason, names in found.items()]


def _fused_faults(spec: ExportSpec) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in spec.schemes:
        parent, _, own = name.rpartition(".")
        for parts in (parts for parts in FUSED.values() if own in parts):
            siblings = [f"{parent}.{part}" for part in parts]
            whole = all(sibling in spec.schemes or f"{sibling}.weight" in spec.checkpoint.tensors for sibling in siblings)
            if whole and len({spec.schemes.get(sibling) for sibling in siblings}) > 1:
                reason = (
                    f"vLLM joins {', '.join(parts)} into one layer, and they are not all quantized alike; "
                    "give them the same bits, group_size and symmetric, or leave all of them out"
                )
                found.setdefault(reason, [])
                if parent not in found[reason]:
                    found[reason].append(parent)
    return _lines(found)


def _zero_points_fill_words(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    rows, _ = linear_shape(spec.checkpoint, name)
    if scheme.symmetric or rows * scheme.bits % 32 == 0:
        return None
    return (
        f"{rows} outputs at {scheme.bits} bits do not fill 32-bit words, and vLLM cannot load such zero points; "
        "set symmetric: true on the stage, or leave the layer out"
    )


def _inputs_go_with_8_bits(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.type == "float" or scheme.activations is None:
        return None
    if scheme.bits == 8 and scheme.symmetric and scheme.group_size == -1:
        return None
    return (
        "vLLM rounds inputs to integers only beside symmetric weights of 8 bits with one scale per output channel; "
        "set bits: 8, symmetric: true and group_size: -1, or leave activations away"
    )


def _blocks_fit_joined(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    """Blocks of 128 rows must not reach from one of the linears that vLLM joins into the next."""
    if scheme.block_rows != BLOCK:
        return None
    own = name.rpartition(".")[2]
    rows = linear_shape(spec.checkpoint, name)[0] // _JOINED.get(own, 1)
    inner = own in _JOINED or any(own in parts[:-1] for parts in FUSED.values())
    if not inner or rows % BLOCK == 0:
        return None
    return (
        f"vLLM joins it with others, and its {rows} outputs are no whole number of blocks of {BLOCK}; "
        "use a scale per output channel instead of blocks, or leave the layer out"
    )


def _only_integer_weights(layout: Layout) -> Reason:
    def reason(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        if scheme.type == "int" and scheme.activations is None:
            return None
        held = "8-bit floats" if scheme.type == "float" else "rounded activations"
        return f"layout {layout} holds integer weights alone, not {held}; {_OTHERWISE}"

    return reason


def _awq_bits(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    return None if scheme.bits == _AWQ_BITS else f"layout awq holds 4 bits, not {scheme.bits}; {_OTHERWISE}"


def _awq_rows(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del scheme
    rows, _ = linear_shape(spec.checkpoint, name)
    return f"layout awq holds outputs by eights, not {rows}; {_OTHERWISE}, or leave the layer out" if rows % _AWQ_COLUMNS else None


def _gptq_bits(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.bits not in _GPTQ_BITS:
        return f"layout gptq holds 4 or 8 bits, not {scheme.bits}; {_OTHERWISE}"
    return (
        None if scheme.symmetric else f"layout gptq holds symmetric grids alone; set symmetric: true on the stage, or {_OTHERWISE}"
    )


def _gptq_groups(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    del spec, name
    if scheme.group_size in _GPTQ_GROUPS:
        return None
    return (
        f"vLLM loads layout gptq in groups of 32, 64 or 128, or -1, not {scheme.group_size}; set such a group_size, or {_OTHERWISE}"
    )


def _gptq_words(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    rows, columns = linear_shape(spec.checkpoint, name)
    if rows * scheme.bits % 32 == 0 and columns * scheme.bits % 32 == 0:
        return None
    return (
        f"layout gptq holds inputs and outputs in whole 32-bit words, which {rows} × {columns} at {scheme.bits} bits do not fill; "
        f"{_OTHERWISE}, or leave the layer out"
    )


def _one_width(spec: ExportSpec) -> Reason:
    usual = Counter(scheme.bits for scheme in spec.schemes.values()).most_common(1)[0][0]

    def reason(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        return (
            None if scheme.bits == usual else f"layout gptq holds one width, {usual} here, and not {scheme.bits} too; {_OTHERWISE}"
        )

    return reason


def _one_group_size(spec: ExportSpec, layout: Layout) -> Reason:
    usual = Counter(scheme.group_size for scheme in spec.schemes.values()).most_common(1)[0][0]

    def reason(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
        del spec, name
        if scheme.group_size == usual:
            return None
        return f"layout {layout} holds one group size, {usual} here, and not {scheme.group_size} as well; {_OTHERWISE}"

    return reason


def _needs_a_gpu(spec: ExportSpec, name: str, scheme: Scheme) -> str | None:
    if scheme.type == "float" and (scheme.activations == "tensor" or scheme.block_rows == BLOCK):
        held = "blocks" if scheme.block_rows == BLOCK else "fixed scales of inputs"
        return f"vLLM's build for CPUs runs 8-bit floats without {held}, or on processors with AMX: this artifact needs a GPU"
    if scheme.format != "pack-quantized":
        return None
    if scheme.bits != _CPU_BITS:
        return f"vLLM's build for CPUs runs weights of 4 bits, not {scheme.bits}: this artifact needs a GPU"
    rows, columns = linear_shape(spec.checkpoint, name)
    if rows % _CPU_TILE or columns % _CPU_TILE:
        return (
            f"vLLM's build for CPUs runs sides that are multiples of {_CPU_TILE}, not {rows} × {columns}: this artifact needs a GPU"
        )
    return None
