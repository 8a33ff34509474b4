"""An export of the last checkpoint: the artifact in a runtime's format, with the record of what made it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from compress.checkpoints.artifact import file_digest, write_record
from compress.data.samples import MANIFEST, read_manifest
from compress.export.format import Export, ExportContext
from compress.families import Family
from compress.pipeline.steps.calibration import Calibrate
from compress.pipeline.steps.model import PublishedModel
from compress.pipeline.steps.step import Input, Step, StepContext, versions_of
from compress.recipe.model import Model
from compress.stages.stage import Stage


def versions_of_entries(stages: Iterable[Stage], exports: Iterable[Export]) -> dict[str, str]:
    """Return the versions of this package and of the libraries that shape the results of stages and exports, in any environment."""
    libraries = {name: version for entry in (*stages, *exports) for name, version in entry.versions().items()}
    return {**versions_of("vlm-compress"), **dict(sorted(libraries.items()))}


@dataclass(frozen=True)
class Lineage:
    """What an artifact was made of: the model, the stages, the samples, the device."""

    model: PublishedModel
    settings: Model
    stages: tuple[Stage, ...]
    calibration: Calibrate | None
    device: str

    def record(self, run: StepContext, export: Export) -> dict[str, Any]:
        """Return an artifact's record: its source, and every setting that shaped it."""
        record: dict[str, Any] = {
            "artifact": export.artifact,
            "source": self.model.pin.describe(),
            "source_digest": self.model.key,
            "stages": [stage.model_dump(mode="json") for stage in self.stages],
            "export": export.model_dump(mode="json"),
            "device": self.device,
            "versions": versions_of_entries(self.stages, [export]),
        }
        if self.calibration is not None:
            folder = self.calibration.at(run)
            manifest = read_manifest(folder)
            record["calibration"] = {
                "seed": self.calibration.seed,
                "digest": manifest["digest"],
                "manifest_sha256": file_digest(folder / MANIFEST),
                # Digests, not contents: calibration data may not be published, yet anyone who has it can check that it is the same.
                "samples": [sample["sha256"] for sample in cast("list[dict[str, Any]]", manifest["samples"])],
            }
        return record


@dataclass(frozen=True, eq=False)
class ExportArtifact(Step):
    """An artifact in a runtime's format, with its record `compress.json`."""

    revision: ClassVar[int] = 4
    verifies_inputs: ClassVar[bool] = True

    name: str
    export: Export

    checkpoint: Input
    """The last checkpoint."""

    family: Family
    lineage: Lineage
    expected_bytes: int | None = None

    @property
    def artifact(self) -> str:
        """The artifact's name."""
        return self.export.artifact

    @property
    def format(self) -> str:
        """The format's name."""
        return str(self.export.format)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The last checkpoint."""
        return (self.checkpoint,)

    def key_fields(self) -> object:
        """Return the export's settings, revision and versions, and what the record says of the model beyond its weights."""
        return [self.export.model_dump(mode="json"), *self.export.key_fields(), self.lineage.settings.model_dump(mode="json")]

    def make(self, run: StepContext, target: Path) -> None:
        """Write the artifact."""
        context = ExportContext(source=self.checkpoint.at(run), target=target, family=self.family, progress=run.progress)
        self.export.apply(context)
        write_record(target, self.lineage.record(run, self.export))
