"""The vLLM export: a checkpoint folder with quantized linears in a layout that vLLM's kernels read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from compress.checkpoints.awq_gptq_config import check_packed_config
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_config
from compress.checkpoints.layouts import (
    linear_tensors,
    quantized_names,
    unquantized_linears,
)
from compress.checkpoints.module_names import misnamed, misnaming_message
from compress.checkpoints.quantization_config import METHOD, KernelKind, foreign_format, kernel_kinds_in, products_of
from compress.checkpoints.spec import CheckpointSpec, QuantizedLinear, spec_of
from compress.errors import CheckpointError
from compress.export.format import Export, ExportContext, Usage
from compress.export.vllm.limits import Layout, faults, notes
from compress.families import Family
from compress.numerics.scheme import Scheme

_INDEX_BYTES = 4
"""Bytes of an int32 entry of GPTQ's `g_idx`."""


class VllmExport(Export):
    """A checkpoint for `vllm serve`, with the integers and scales that the stages chose: nothing is rounded again.

    Layout `awq` is AutoAWQ's GEMM: 4 bits, one group size, read by many runtimes. `gptq` is GPTQ's: 4 or 8 bits, symmetric, one
    group size. `compressed-tensors` supports all widths, FP8, quantized activations, KV cache scales, several schemes at once, and
    checkpoints that are not quantized.
    """

    revision: ClassVar[int] = 3
    usage: ClassVar[Usage] = Usage("vllm", "```\nvllm serve FOLDER\n```")

    format: Literal["vllm"]
    layout: Layout

    @property
    def artifact(self) -> str:
        """The artifact's name: format and layout."""
        return f"{self.format}-{self.layout}"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return True: whatever no other format recognises is read as a checkpoint, and the reader says what is missing."""
        del cls, folder
        return True

    @classmethod
    def weight_files(cls, folder: Path) -> list[Path]:
        """Return the safetensors files and their index."""
        return sorted(open_checkpoint(folder).weight_files)

    @classmethod
    def weight_bytes(cls, folder: Path) -> int:
        """Return the size of all tensors, in bytes."""
        return open_checkpoint(folder).weight_bytes

    @classmethod
    def check_artifact(cls, folder: Path, family: Family) -> None:
        """Check that AWQ's and GPTQ's settings are supported, and fit the tensors' shapes.

        Raises:
            CheckpointError: a setting is not supported, or does not fit.
        """
        del family
        check_packed_config(open_checkpoint(folder))

    @classmethod
    def kernel_kinds_in(cls, folder: Path) -> frozenset[KernelKind]:
        """Return the matrix products that config.json's quantization needs."""
        return kernel_kinds_in(read_config(folder))

    def kernel_kinds(self, schemes: Iterable[Scheme]) -> frozenset[KernelKind]:
        """Return the matrix products of these schemes: vLLM has a kernel for each."""
        return products_of(schemes)

    def check(self, spec: CheckpointSpec) -> list[str]:
        """Return the linears that vLLM, or the layout, does not support."""
        return faults(self.layout, spec)

    def notes(self, spec: CheckpointSpec, original_bytes: int | None = None) -> list[str]:
        """Return which vLLM versions serve the model, if not all, and what needs a GPU."""
        del original_bytes
        return notes(spec)

    @classmethod
    def warnings(cls, folder: Path, family: Family) -> list[str]:
        """Return the linears whose quantization transformers gets wrong, as its module names differ from those in config.json."""
        checkpoint = open_checkpoint(folder)
        settings = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
        quantized = quantized_names(checkpoint)
        if settings.get("quant_method") != METHOD or not quantized:
            return []
        linears = misnamed(settings, family, quantized, unquantized_linears(checkpoint, family, quantized))
        return [misnaming_message(f"{folder}/config.json", linears, family)] if linears else []

    def predict_bytes(self, spec: CheckpointSpec) -> int:
        """Return the exact size of the tensors it writes."""
        if self.layout == "compressed-tensors":
            return spec.weight_bytes
        replaced = {tensor for name in spec.quantized for tensor in linear_tensors(name)}
        unchanged = sum(tensor.bytes for name, tensor in spec.tensors.items() if name not in replaced)
        # Other sizes than compressed-tensors': scales are float16, and symmetric grids have zero points too.
        return unchanged + sum(map(self._linear_bytes, spec.quantized.values()))

    def _linear_bytes(self, linear: QuantizedLinear) -> int:
        """Return the size of codes, zero points, float16 scales and, in GPTQ's layout, `g_idx`."""
        groups = linear.rows * linear.scheme.groups(linear.columns)
        index = _INDEX_BYTES * linear.columns if self.layout == "gptq" else 0
        # Codes and zero points have `bits` each; a scale has two bytes.
        return (linear.columns * linear.rows + groups) * linear.scheme.bits // 8 + groups * 2 + index

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: a linear does not fit the layout.
        """
        from compress.export.vllm.writer import link_packed, write_laid_out

        checkpoint = open_checkpoint(context.source)
        # NVFP4, MXFP4 and the like reach vLLM byte for byte: nothing here could write them again.
        if foreign := foreign_format(checkpoint.config):
            self._link_foreign(context, checkpoint, foreign)
            return
        spec = spec_of(checkpoint, context.family)
        if problems := self.check(spec):
            raise CheckpointError("\n".join(problems))
        if self.layout == "compressed-tensors":
            link_packed(context, checkpoint, unquantized_linears(checkpoint, context.family, spec.schemes))
        else:
            write_laid_out(context, spec, self.layout)

    def _link_foreign(self, context: ExportContext, checkpoint: Checkpoint, foreign: str) -> None:
        """Link a checkpoint in a format that vLLM reads and this package does not, unchanged."""
        from compress.export.vllm.writer import link_packed

        if self.layout != "compressed-tensors":
            raise CheckpointError(
                f"{context.source}: its weights are {foreign}, which layout {self.layout} cannot hold; "
                "set layout: compressed-tensors"
            )
        link_packed(context, checkpoint, [])
