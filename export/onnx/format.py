"""The ONNX export: a graph per component with external data, for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.checkpoints.checkpoint import open_checkpoint, read_json_object
from compress.checkpoints.spec import CheckpointSpec
from compress.export.format import ExportContext, Usage, VerifiedExport, VerifyContext
from compress.export.onnx.apply import OnnxExport
from compress.export.onnx.cost import cost_notes
from compress.export.onnx.graphs import GRAPHS
from compress.export.onnx.limits import expected_bytes, faults
from compress.files import disk_errors, write_json

if TYPE_CHECKING:
    from compress.verification.results import Verification


class Onnx(OnnxExport, VerifiedExport):
    """ONNX graphs with external data, with the integers and scales that the stages chose: nothing is rounded again."""

    revision: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx")
    graphs: ClassVar[Mapping[str, Iterable[str]]] = GRAPHS
    usage: ClassVar[Usage] = Usage(
        "onnxruntime",
        "Each `.onnx` file is a graph for ONNX Runtime; the `.onnx_data` files beside it are its weights: keep them together. "
        "Inputs and outputs are named in the graphs; tokenizer and processor in this folder prepare prompts and images for them.",
    )

    format: Literal["onnx"]

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether it has ONNX graphs."""
        return any(folder.glob("*.onnx"))

    def check(self, spec: CheckpointSpec) -> list[str]:
        """Return the architecture, linears or settings that are not supported."""
        return faults(self, spec)

    def notes(self, spec: CheckpointSpec, original_bytes: int | None = None) -> list[str]:
        """Return the size of the components that no stage quantized, and the settings that shrink them."""
        return cost_notes(self, spec, original_bytes)

    def predict_bytes(self, spec: CheckpointSpec) -> int:
        """Return the size of the weights it writes."""
        return expected_bytes(self, spec)

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: the checkpoint is not supported.
            StoreError: the folder cannot be written.
        """
        from compress.checkpoints.artifact import copy_side_files
        from compress.checkpoints.output_head import written_config
        from compress.export.onnx.graphs.layer_builder import Source
        from compress.export.onnx.graphs.write import Precision, write_graphs

        checkpoint = self.open_supported(context)
        precision = Precision(self.dtype, self.accuracy_level, self.head_bits, self.embedding_bits)
        write_graphs(Source.of(checkpoint, context.family), precision, context.target, context.progress)
        # No quantized tensor is left in the folder: with that section transformers would look for them when it reads the config.
        config = {key: value for key, value in written_config(checkpoint, context.family).items() if key != "quantization_config"}
        with disk_errors(context.target):
            write_json(context.target / "config.json", config)
            copy_side_files(context.source, context.target)
            _write_image_processor(context.target)

    def verification_versions(self) -> dict[str, str]:
        """Return the versions of ONNX Runtime, and of the libraries that prepare its inputs.

        Raises:
            MissingError: it is not installed.
        """
        from compress.runtimes.onnxruntime.runtime import Onnxruntime

        # Through the runtime, which knows whether onnxruntime or onnxruntime-gpu is installed.
        return Onnxruntime(runtime="onnxruntime").versions()

    def verify(self, context: VerifyContext) -> Verification:
        """Compare every graph with the checkpoint's component, and ONNX Runtime's answers with the checkpoint's, on the CPU.

        Raises:
            VerificationError: a difference exceeds its limit.
            CheckpointError: a graph, or the checkpoint, cannot be loaded.
        """
        from compress.runtimes.onnxruntime.runtime import Onnxruntime
        from compress.verification.limits import ExportPrecision, limits_of
        from compress.verification.verify import verify_graphs

        settings = ExportPrecision(self.dtype, self.accuracy_level, self.head_bits, self.embedding_bits)
        limits = limits_of(settings, open_checkpoint(context.source), context.family)
        # On the CPU even where there is a GPU: the limits are set for its arithmetic, and CUDA lacks operators of float32 graphs.
        return verify_graphs(context, Onnxruntime(runtime="onnxruntime", providers=("cpu",)), limits)


def _write_image_processor(folder: Path) -> None:
    """Write `preprocessor_config.json` from `processor_config.json` if it is missing: other ONNX runtimes read the former."""
    source, target = folder / "processor_config.json", folder / "preprocessor_config.json"
    if target.exists() or not source.is_file():
        return
    settings = read_json_object(source)
    if image_processor := settings.get("image_processor"):
        write_json(target, {**image_processor, "processor_class": settings.get("processor_class")})
