"""Artifacts that onnxruntime-genai runs, images included: a decoder by that project's own builder, our graphs beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compress.export.format import ExportContext, ExportSpec, VerifiedExport, VerifyContext
from compress.export.onnx_cost import cost_notes
from compress.export.onnx_export import OnnxExport
from compress.export.onnx_genai_limits import faults, notes
from compress.export.onnx_limits import expected_bytes

if TYPE_CHECKING:
    from compress.verification.results import Verification


class OnnxGenai(OnnxExport, VerifiedExport):
    """A folder for onnxruntime-genai: `genai_config.json`, its image processor's config, and a graph per component.

    `decoder: builder` takes the graph that onnxruntime-genai's own model builder makes, in its own environment; `own` the one of
    `format: onnx`, which needs no such environment and holds more (Qwen2-VL, 8-bit activations, groups of any size). Vision and
    embeddings are this package's either way. Linears of 4 or 8 bits have the very integers that the stages chose; for the builder
    they are laid out as AWQ's or GPTQ's, which store scales as float16. The other settings are those of `OnnxExport`.
    """

    revision: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "onnx")
    runtimes: ClassVar[frozenset[str]] = frozenset({"onnxruntime-genai"})

    format: Literal["onnx-genai"]
    decoder: Literal["builder", "own"] = "builder"

    @property
    def marks(self) -> str:
        """What in an artifact's name tells settings apart; empty for the plain ones."""
        return f"{'-own' if self.decoder == 'own' else ''}{super().marks}"

    def check(self, spec: ExportSpec) -> list[str]:
        """Return the architecture, linears or settings that onnxruntime-genai, or its builder, cannot hold."""
        return faults(self, spec)

    def notes(self, spec: ExportSpec) -> list[str]:
        """Return in what the runtime reads prompts otherwise than the checkpoint's own processor, and what floats cost."""
        return [*notes(), *cost_notes(self, spec)]

    def predict_bytes(self, spec: ExportSpec) -> int:
        """Return the size of the weights it writes."""
        return expected_bytes(self, spec, built=self.decoder == "builder")

    def apply(self, context: ExportContext) -> None:
        """Write the artifact.

        Raises:
            CheckpointError: the checkpoint holds something that cannot be held so, or the builder failed.
            MissingError: the builder's environment is not installed.
            StoreError: the folder cannot be written.
        """
        from compress.export.onnx_genai_write import write_folder

        write_folder(self, context, self.checked(context))

    def versions(self) -> dict[str, str]:
        """Return what makes the graphs here, and with `decoder: builder` the environment whose builder makes the decoder.

        Raises:
            MissingError: that environment is not installed.
        """
        from compress.runtimes.onnxruntime_genai import ENVIRONMENT, OnnxruntimeGenai

        if self.decoder == "own":
            return super().versions()
        built = OnnxruntimeGenai(runtime="onnxruntime-genai").versions()
        return super().versions() | {f"{ENVIRONMENT}/{name}": version for name, version in built.items()}

    def verification_versions(self) -> dict[str, str]:
        """Return the versions in onnxruntime-genai's environment, and of what computes the checkpoint and the graphs here.

        Raises:
            MissingError: one of the two runtimes is not installed.
        """
        from compress.runtimes.onnxruntime import Onnxruntime
        from compress.runtimes.onnxruntime_genai import ENVIRONMENT, OnnxruntimeGenai

        own = OnnxruntimeGenai(runtime="onnxruntime-genai").versions()
        here = Onnxruntime(runtime="onnxruntime").versions()
        return here | {f"{ENVIRONMENT}/{name}": version for name, version in own.items()}

    def verify(self, context: VerifyContext) -> Verification:
        """Compare every graph with the checkpoint's own part, and what onnxruntime-genai answers, on the CPU.

        Raises:
            VerificationError: they differ by more than the limits of what was rounded.
            CheckpointError: a graph, or the checkpoint, cannot be loaded.
            MissingError: onnxruntime-genai is not installed.
        """
        from compress.export.onnx_genai_verify import verify_folder

        return verify_folder(self, context)
