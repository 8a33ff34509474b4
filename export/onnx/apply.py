"""The settings that all ONNX exports share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.quantization_config import foreign_format
from compress.checkpoints.spec import spec_of
from compress.errors import CheckpointError
from compress.export.format import Export, ExportContext
from compress.families import Family


class OnnxExport(Export, ABC):
    """An export with graphs emitted by this package.

    Linears with 4- or 8-bit weights become MatMulNBits. W8A8 becomes MatMulInteger with a scale per token, or Q/DQ with a static
    scale, as the stage chose.
    """

    dtype: Literal["float32", "float16"] = "float32"
    """The type that the graphs compute in."""

    accuracy_level: Literal[0, 4] = 4
    """MatMulNBits' attribute: 4 lets it quantize its input to 8 bits in blocks, 0 does not."""

    head_bits: Literal[4, 8] | None = None
    """Rounds the output head to nearest in blocks of 32, unless a stage quantized it."""

    embedding_bits: Literal[8] | None = None
    """Rounds the embeddings to nearest in blocks of 32. Tied embeddings and head are stored once if their bits are equal."""

    graphs: ClassVar[Mapping[str, Iterable[str]]] = {}
    """The names of the graphs that every artifact has, by family; none where they depend on the settings."""

    @classmethod
    def weight_files(cls, folder: Path) -> list[Path]:
        """Return the graphs and their external data."""
        # `NAME.onnx_data` is written here, `model.onnx.data` by onnxruntime-genai's model builder.
        return sorted(path for pattern in ("*.onnx", "*.onnx_data", "*.onnx.data") for path in folder.glob(pattern))

    @classmethod
    def check_artifact(cls, folder: Path, family: Family) -> None:
        """Check that config.json, every graph and all their data are there, where the package onnx is installed to read graphs.

        Raises:
            CheckpointError: a file is missing, truncated, or no graph.
        """
        # The package onnx is an optional dependency: without it the runtime itself reports a damaged graph, only later.
        if find_spec("onnx") is None:
            return
        from compress.export.onnx.files import check_artifact

        check_artifact(folder, cls.graphs.get(family.name, ()))

    @property
    def artifact(self) -> str:
        """The artifact's name: the format and a suffix per setting that is not the default."""
        return f"{self.format}{self.suffix}"

    @property
    def suffix(self) -> str:
        """The suffixes of the artifact's name; empty for the default settings."""
        suffixes = [
            "-float16" if self.dtype == "float16" else "",
            "-exact" if self.accuracy_level == 0 else "",
            f"-head{self.head_bits}" if self.head_bits else "",
            f"-embeddings{self.embedding_bits}" if self.embedding_bits else "",
        ]
        return "".join(suffixes)

    def open_supported(self, context: ExportContext) -> Checkpoint:
        """Open the checkpoint and check that it is supported.

        Raises:
            CheckpointError: it is not.
        """
        checkpoint = open_checkpoint(context.source)
        if foreign := foreign_format(checkpoint.config):
            raise CheckpointError(f"{context.source}: its weights are {foreign}, which no graph here can hold; use format: vllm")
        spec = spec_of(checkpoint, context.family)
        if problems := self.check(spec):
            raise CheckpointError("\n".join(problems))
        return checkpoint
