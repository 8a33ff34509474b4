"""Artifacts that vLLM loads: a checkpoint's folder whose quantized linears are laid out as its kernels expect."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from compress.checkpoint import open_checkpoint
from compress.errors import CheckpointError
from compress.export.format import Export, ExportContext, Outlook
from compress.layouts import linear_shape, linear_tensors, packed_bytes, quantized_linears, unquantized_linears
from compress.numerics.scheme import Scheme

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM joins into one, which must be held alike."""

_SCALE_BYTES = {"F32": 4, "F64": 4}
_AWQ_BITS = 4
_AWQ_COLUMNS = 8


class Vllm(Export):
    """The checkpoint for `vllm serve`, from the very integers and scales that the stages chose.

    `awq` is AutoAWQ's GEMM layout: 4 bits, one group size, read by many runtimes. `compressed-tensors` is pack-quantized: any
    width, and several at once; a checkpoint that is not quantized at all fits it too. Which widths a machine's kernels run is up
    to vLLM: on a CPU 4 bits only, in matrices whose sides are multiples of 32.
    """

    revision: ClassVar[int] = 1

    format: Literal["vllm"]
    layout: Literal["awq", "compressed-tensors"]

    @property
    def artifact(self) -> str:
        """What reports and folders call it: the format and the layout."""
        return f"{self.format}-{self.layout}"

    def check(self, outlook: Outlook) -> list[str]:
        """Return the linears that vLLM, or the layout, cannot hold."""
        faults = _fused_faults(outlook)
        return faults + (_awq_faults(outlook) if self.layout == "awq" else _zero_point_faults(outlook))

    def predict_bytes(self, outlook: Outlook) -> int:
        """Return the exact size of the tensors it writes."""
        checkpoint, total = outlook.checkpoint, 0
        replaced: set[str] = set()
        for name, scheme in outlook.schemes.items():
            shape = linear_shape(checkpoint, name)
            dense = checkpoint.tensors.get(f"{name}.weight")
            scale = dense or checkpoint.tensors[f"{name}.weight_scale"]
            scale_bytes = _SCALE_BYTES.get(scale.dtype, 2)
            total += _awq_bytes(shape, scheme) if self.layout == "awq" else packed_bytes(shape, scheme, scale_bytes)
            replaced.update((*linear_tensors(name), f"{name}.weight"))
        return total + sum(entry.bytes for name, entry in checkpoint.tensors.items() if name not in replaced)

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: a linear does not fit the layout.
        """
        from compress.export.vllm_writer import link_packed, write_awq

        checkpoint = open_checkpoint(context.source)
        outlook = Outlook(checkpoint, context.family, quantized_linears(checkpoint))
        if faults := self.check(outlook):
            raise CheckpointError("\n".join(faults))
        if self.layout == "awq":
            write_awq(context, outlook)
        else:
            link_packed(context, checkpoint, unquantized_linears(checkpoint, context.family, outlook.schemes))


def _fused_faults(outlook: Outlook) -> list[str]:
    faults: dict[str, list[str]] = {}
    for name in outlook.schemes:
        parent, _, own = name.rpartition(".")
        for parts in (parts for parts in _FUSED if own in parts):
            siblings = [f"{parent}.{part}" for part in parts]
            whole = all(sibling in outlook.schemes or _is_dense(outlook, sibling) for sibling in siblings)
            if whole and len({outlook.schemes.get(sibling) for sibling in siblings}) > 1:
                reason = (
                    f"vLLM joins {', '.join(parts)} into one layer, and they are not all quantized alike; "
                    "give them the same bits, group_size and symmetric, or leave all of them out"
                )
                faults.setdefault(reason, [])
                if parent not in faults[reason]:
                    faults[reason].append(parent)
    return _lines(faults)


def _is_dense(outlook: Outlook, name: str) -> bool:
    return f"{name}.weight" in outlook.checkpoint.tensors


def _awq_faults(outlook: Outlook) -> list[str]:
    remedy = "set layout: compressed-tensors"
    if not outlook.schemes:
        return ["export: layout awq holds quantized weights, and no stage quantizes any; add a stage such as awq, or " + remedy]
    faults: dict[str, list[str]] = {}
    usual = Counter(scheme.group_size for scheme in outlook.schemes.values()).most_common(1)[0][0]
    for name, scheme in outlook.schemes.items():
        rows, _ = linear_shape(outlook.checkpoint, name)
        if scheme.bits != _AWQ_BITS:
            faults.setdefault(f"layout awq holds 4 bits, not {scheme.bits}; {remedy}", []).append(name)
        elif scheme.group_size != usual:
            reason = f"layout awq holds one group size, {usual} here, and not {scheme.group_size} as well; {remedy}"
            faults.setdefault(reason, []).append(name)
        elif rows % _AWQ_COLUMNS:
            reason = f"layout awq holds outputs by eights, not {rows}; {remedy}, or leave the layer out"
            faults.setdefault(reason, []).append(name)
    return _lines(faults)


def _zero_point_faults(outlook: Outlook) -> list[str]:
    faults: dict[str, list[str]] = {}
    for name, scheme in outlook.schemes.items():
        rows, _ = linear_shape(outlook.checkpoint, name)
        if not scheme.symmetric and rows * scheme.bits % 32:
            reason = (
                f"{rows} outputs at {scheme.bits} bits do not fill 32-bit words, and vLLM cannot load such zero points; "
                "set symmetric: true on the stage, or leave the layer out"
            )
            faults.setdefault(reason, []).append(name)
    return _lines(faults)


def _lines(faults: dict[str, list[str]]) -> list[str]:
    """Return one line for each reason, which names the first linear it holds for and counts the others."""
    return [f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {reason}" for reason, names in faults.items()]


def _awq_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    rows, columns = shape
    groups = scheme.groups(columns)
    return columns * rows // 2 + groups * rows // 2 + groups * rows * 2
