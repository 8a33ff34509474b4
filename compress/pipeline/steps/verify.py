"""The comparison of an artifact with the checkpoint that it was exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.export.format import VerifiedExport, VerifyContext
from compress.pipeline.steps.export import ExportArtifact
from compress.pipeline.steps.step import Input, Step, StepContext
from compress.verification.results import Verification, read_verification, write_verification


@dataclass(frozen=True, eq=False)
class VerifyArtifact(Step):
    """What the comparison found: every component, and whole answers."""

    revision: ClassVar[int] = 4
    feeds_verdict: ClassVar[bool] = True

    name: str
    export: VerifiedExport
    artifact: ExportArtifact

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The artifact."""
        return (self.artifact,)

    def key_fields(self) -> object:
        """Return the revision and versions of the comparison, and the processor where graphs run on it."""
        return self.export.verification_shaping()

    def make(self, run: StepContext, target: Path) -> None:
        """Compare the two.

        Raises:
            VerificationError: a difference exceeds its limit.
        """
        context = VerifyContext(
            artifact=self.artifact.at(run),
            source=self.artifact.checkpoint.at(run),
            family=self.artifact.family,
            progress=run.progress,
            logs=run.logs(self.name),
            trust_remote_code=run.trust_remote_code,
        )
        write_verification(target, self.export.verify(context))

    def read(self, folder: Path) -> Verification:
        """Return what the comparison found.

        Raises:
            DataError: it cannot be read.
        """
        return read_verification(folder)
