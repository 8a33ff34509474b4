"""A stage of the recipe, applied to the checkpoint before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import difference, spec_of
from compress.families import Family
from compress.pipeline.steps.calibration import Calibrate
from compress.pipeline.steps.step import Input, Step, StepContext
from compress.stages.stage import Stage, StageContext, StagePlan


@dataclass(frozen=True, eq=False)
class ApplyStage(Step):
    """A checkpoint that a stage made of another."""

    revision: ClassVar[int] = 4
    resumes: ClassVar[bool] = True  # finished blocks are committed
    verifies_inputs: ClassVar[bool] = True

    name: str
    stage: Stage
    before: Input
    """The checkpoint that the stage reads."""

    calibration: Calibrate | None
    """The samples; None where the stage reads none."""

    seed: int
    family: Family
    device: str
    devices: tuple[str, ...]
    """The device and the GPU's name: another GPU has other kernels, which round differently."""

    plan: StagePlan | None = None
    """What the stage will leave; None where the original's headers could not be read yet."""

    expected_bytes: int | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The checkpoint before, and the samples."""
        return (self.before,) if self.calibration is None else (self.before, self.calibration)

    def key_fields(self) -> object:
        """Return the stage's settings, revision and versions, the devices and the seed."""
        return [self.stage.model_dump(mode="json"), self.stage.revision, self.stage.versions(), list(self.devices), self.seed]

    def make(self, run: StepContext, target: Path) -> None:
        """Apply the stage; warn where the checkpoint is another one than was planned."""
        context = StageContext(
            source=self.before.at(run),
            target=target,
            calibration=None if self.calibration is None else self.calibration.at(run),
            family=self.family,
            device=self.device,
            seed=self.seed,
            progress=run.progress,
            trust_remote_code=run.trust_remote_code,
            logs=run.folder / "logs" / self.name,
        )
        self.stage.apply(context)
        if self.plan is not None and self.plan.exact and self.plan.after:
            # A warning, not an error: the output is what the stage made; the fault is in its plan.
            found = difference(self.plan.after[0], spec_of(open_checkpoint(target), self.family))
            if found:
                run.progress.warn(f"{self.name}: the checkpoint is another one than was planned: {found}; please report this")
