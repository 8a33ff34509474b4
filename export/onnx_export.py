"""What the exports to ONNX share: how the graphs compute, and in how many bits they hold what no stage quantized."""

from __future__ import annotations

from abc import ABC
from typing import Literal

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import CheckpointError
from compress.export.format import Export, ExportContext, ExportSpec
from compress.layouts import has_kv_scales, quantized_linears
from compress.quantization_config import foreign_format


class OnnxExport(Export, ABC):
    """An export whose graphs this package emits.

    `dtype` is what the graphs compute in. Weights of 4 or 8 bits become MatMulNBits, which `accuracy_level` 4 lets round its input
    to 8 bits in blocks (0: not at all); weights and activations of 8 bits become integer products with a scale per token, or
    Q/DQ with a fixed scale, as the stage chose. `head_bits` and `embedding_bits` round the output head and the embeddings to
    nearest in blocks of 32, where no stage did; embeddings and a head that are one are stored once.
    """

    dtype: Literal["float32", "float16"] = "float32"
    accuracy_level: Literal[0, 4] = 4
    head_bits: Literal[4, 8] | None = None
    embedding_bits: Literal[8] | None = None

    @property
    def artifact(self) -> str:
        """What reports and folders call it: the format, and what differs from the plain one."""
        return f"{self.format}{self.marks}"

    @property
    def marks(self) -> str:
        """What in an artifact's name tells settings apart; empty for the plain ones."""
        marks = [
            "-float16" if self.dtype == "float16" else "",
            "-exact" if self.accuracy_level == 0 else "",
            f"-head{self.head_bits}" if self.head_bits else "",
            f"-embeddings{self.embedding_bits}" if self.embedding_bits else "",
        ]
        return "".join(marks)

    def checked(self, context: ExportContext) -> Checkpoint:
        """Return the checkpoint that is to be exported.

        Raises:
            CheckpointError: it holds something that no graph here can.
        """
        checkpoint = open_checkpoint(context.source)
        if foreign := foreign_format(checkpoint.config):
            raise CheckpointError(f"{context.source}: its weights are {foreign}, which no graph here can hold; use format: vllm")
        spec = ExportSpec(checkpoint, context.family, quantized_linears(checkpoint), has_kv_scales(checkpoint))
        if found := self.check(spec):
            raise CheckpointError("\n".join(found))
        return checkpoint
