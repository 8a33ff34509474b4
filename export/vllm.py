"""Artifacts that vLLM loads: a checkpoint's folder whose quantized linears are laid out as its kernels expect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import CheckpointError
from compress.export.format import Export, ExportContext, Outlook
from compress.export.vllm_limits import Layout, faults, notes
from compress.families import Family
from compress.layouts import (
    has_kv_scales,
    linear_shape,
    linear_tensors,
    packed_bytes,
    quantized_linears,
    quantized_names,
    unquantized_linears,
)
from compress.module_names import misnamed, misnaming_message
from compress.numerics.scheme import Scheme
from compress.quantization_config import METHOD, foreign_format

_SCALE_BYTES = {"F32": 4, "F64": 4}
_INDEX_BYTES = 4
_KV_BYTES = 8


class VllmExport(Export):
    """The checkpoint for `vllm serve`, from the very integers and scales that the stages chose.

    `awq` is AutoAWQ's GEMM layout: 4 bits, one group size, read by many runtimes. `gptq` is GPTQ's: 4 or 8 bits, symmetric, one
    group size. `compressed-tensors` holds any width, 8-bit floats, rounded activations, scales of keys and values, and several
    schemes at once; a checkpoint that is not quantized at all fits it too.
    """

    revision: ClassVar[int] = 3
    runtimes: ClassVar[frozenset[str]] = frozenset({"endpoint", "transformers", "vllm"})

    format: Literal["vllm"]
    layout: Layout

    @property
    def artifact(self) -> str:
        """What reports and folders call it: the format and the layout."""
        return f"{self.format}-{self.layout}"

    def check(self, outlook: Outlook) -> list[str]:
        """Return the linears that vLLM, or the layout, cannot hold."""
        return faults(self.layout, outlook)

    def notes(self, outlook: Outlook) -> list[str]:
        """Return which vLLM still serves the model, where that is not every one, and what needs a GPU."""
        return notes(outlook)

    @classmethod
    def warnings(cls, folder: Path, family: Family) -> list[str]:
        """Return which linears transformers takes for something else than they are, where it has other names for them."""
        checkpoint = open_checkpoint(folder)
        settings = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
        quantized = quantized_names(checkpoint)
        if settings.get("quant_method") != METHOD or not quantized:
            return []
        found = misnamed(settings, family, quantized, unquantized_linears(checkpoint, family, quantized))
        return [misnaming_message(f"{folder}/config.json", found, family)] if found else []

    def predict_bytes(self, outlook: Outlook) -> int:
        """Return the exact size of the tensors it writes."""
        checkpoint, total = outlook.checkpoint, 0
        replaced: set[str] = set()
        for name, scheme in outlook.schemes.items():
            shape = linear_shape(checkpoint, name)
            total += self._linear_bytes(shape, scheme, _scale_bytes(checkpoint, name))
            replaced.update((*linear_tensors(name), f"{name}.weight"))
        if outlook.kv_cache and not has_kv_scales(checkpoint):
            total += _KV_BYTES * int(checkpoint.text_config["num_hidden_layers"])
        return total + sum(entry.bytes for name, entry in checkpoint.tensors.items() if name not in replaced)

    def _linear_bytes(self, shape: tuple[int, int], scheme: Scheme, scale_bytes: int) -> int:
        if self.layout == "compressed-tensors":
            return packed_bytes(shape, scheme, scale_bytes)
        rows, columns = shape
        grids = rows * scheme.groups(columns)
        return (columns * rows + grids) * scheme.bits // 8 + grids * 2 + (_INDEX_BYTES * columns if self.layout == "gptq" else 0)

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: a linear does not fit the layout.
        """
        from compress.export.vllm_writer import link_packed, write_laid_out

        checkpoint = open_checkpoint(context.source)
        if foreign := foreign_format(checkpoint.config):
            self._pass_on(context, checkpoint, foreign)
            return
        outlook = Outlook(checkpoint, context.family, quantized_linears(checkpoint), has_kv_scales(checkpoint))
        if found := self.check(outlook):
            raise CheckpointError("\n".join(found))
        if self.layout == "compressed-tensors":
            link_packed(context, checkpoint, unquantized_linears(checkpoint, context.family, outlook.schemes))
        else:
            write_laid_out(context, outlook, self.layout)

    def _pass_on(self, context: ExportContext, checkpoint: Checkpoint, foreign: str) -> None:
        """Give on a checkpoint in a format that vLLM reads and nothing here, as it is."""
        from compress.export.vllm_writer import link_packed

        if self.layout != "compressed-tensors":
            raise CheckpointError(
                f"{context.source}: its weights are {foreign}, which layout {self.layout} cannot hold; "
                "set layout: compressed-tensors"
            )
        link_packed(context, checkpoint, [])


def _scale_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Return the size of a scale: that of the weights while these are dense, and later its own."""
    entry = checkpoint.tensors.get(f"{name}.weight_scale") or checkpoint.tensors[f"{name}.weight"]
    return _SCALE_BYTES.get(entry.dtype, 2)
