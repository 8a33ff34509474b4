"""The onnxruntime-genai export: a decoder by that library's model builder or by this package, with this package's other graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.checkpoints.spec import CheckpointSpec
from compress.export.format import ExportContext, Usage, VerifiedExport, VerifyContext
from compress.export.onnx.apply import OnnxExport
from compress.export.onnx.cost import cost_notes
from compress.export.onnx.limits import expected_bytes
from compress.export.onnx_genai.limits import faults, notes

if TYPE_CHECKING:
    from compress.verification.results import Verification


class OnnxGenai(OnnxExport, VerifiedExport):
    """A folder for onnxruntime-genai: `genai_config.json`, its image processor's config, and a graph per component.

    Linears of 4 or 8 bits have the integers that the stages chose. Vision encoder and embeddings are always this package's graphs.
    """

    revision: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx")
    usage: ClassVar[Usage] = Usage(
        "onnxruntime-genai", '```python\nimport onnxruntime_genai\n\nmodel = onnxruntime_genai.Model("FOLDER")\n```'
    )
    own_files: ClassVar[tuple[str, ...]] = ("genai_config.json", "vision_processor.json")
    """The library's config, which every folder of it has, and the steps of its image processor."""

    format: Literal["onnx-genai"]
    decoder: Literal["builder", "own"] = "builder"
    """`builder`: the graph of onnxruntime-genai's model builder, from its own environment; it reads AWQ's or GPTQ's layout, which
    stores scales as float16. `own`: the graph of `format: onnx`, for Qwen2-VL, 8-bit activations and other group sizes too."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether it has the library's config."""
        return (folder / cls.own_files[0]).is_file()

    @property
    def suffix(self) -> str:
        """The suffixes of the artifact's name; empty for the default settings."""
        return f"{'-own' if self.decoder == 'own' else ''}{super().suffix}"

    def check(self, spec: CheckpointSpec) -> list[str]:
        """Return the architecture, linears or settings that onnxruntime-genai, or its builder, does not support."""
        return faults(self, spec)

    def notes(self, spec: CheckpointSpec, original_bytes: int | None = None) -> list[str]:
        """Return the differences in prompt processing from the checkpoint's processor, and the size of unquantized components."""
        return [*notes(), *cost_notes(self, spec, original_bytes)]

    def predict_bytes(self, spec: CheckpointSpec) -> int:
        """Return the size of the weights it writes."""
        return expected_bytes(self, spec, built=self.decoder == "builder")

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: the checkpoint is not supported, or the builder failed.
            MissingError: the builder's environment is not installed.
            StoreError: the folder cannot be written.
        """
        from compress.export.onnx_genai.write import write_folder

        write_folder(self, context, self.open_supported(context))

    def versions(self) -> dict[str, str]:
        """Return the versions that emit the graphs and, with `decoder: builder`, those of the builder's environment.

        Raises:
            MissingError: that environment is not installed.
        """
        from compress.runtimes.onnxruntime_genai.runtime import ENVIRONMENT, OnnxruntimeGenai

        if self.decoder == "own":
            return super().versions()
        # The builder decides names, fusions and rounding of the decoder, so that its versions belong in the artifact's key.
        builder = OnnxruntimeGenai(runtime="onnxruntime-genai").versions()
        return super().versions() | {f"{ENVIRONMENT}/{name}": version for name, version in builder.items()}

    def verification_versions(self) -> dict[str, str]:
        """Return the versions in onnxruntime-genai's environment, and of ONNX Runtime and the checkpoint's libraries here.

        Raises:
            MissingError: one of the two runtimes is not installed.
        """
        from compress.runtimes.onnxruntime.runtime import Onnxruntime
        from compress.runtimes.onnxruntime_genai.runtime import ENVIRONMENT, OnnxruntimeGenai

        genai = OnnxruntimeGenai(runtime="onnxruntime-genai").versions()
        onnxruntime = Onnxruntime(runtime="onnxruntime").versions()
        return onnxruntime | {f"{ENVIRONMENT}/{name}": version for name, version in genai.items()}

    def verify(self, context: VerifyContext) -> Verification:
        """Compare every graph with the checkpoint's component, and onnxruntime-genai's answers with the checkpoint's, on the CPU.

        Raises:
            VerificationError: a difference exceeds its limit.
            CheckpointError: a graph, or the checkpoint, cannot be loaded.
            MissingError: onnxruntime-genai is not installed.
        """
        from compress.export.onnx_genai.verify import verify_folder

        return verify_folder(self, context)
