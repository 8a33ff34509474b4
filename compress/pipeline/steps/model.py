"""The published model and existing artifacts: inputs of steps that no step makes; and the conversion of pickled weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.hubs.hub import ModelPin, fetch_model
from compress.hubs.pickles import convert_pickle
from compress.pipeline.steps.step import Input, Step, StepContext, versions_of


@dataclass(frozen=True)
class PublishedModel:
    """The model as it was published: a folder, or a commit on a hub, fetched when a step first needs it."""

    pin: ModelPin

    key: str
    """The digest of its weights and of the files beside them."""

    side_key: str
    """The digest of the files beside its weights."""

    allow_pickle: bool = False

    def at(self, run: StepContext) -> Path:
        """Return its folder; what a hub's cache lacks is fetched."""
        # Once per run: a hub that is asked for every step would slow cached ones.
        if self.key not in run.fetched:
            fetched = fetch_model(self.pin, run.progress, allow_pickle=self.allow_pickle, trust_remote_code=run.trust_remote_code)
            run.fetched[self.key] = fetched
        return run.fetched[self.key]


@dataclass(frozen=True)
class ExistingArtifact:
    """An artifact that was there before the run."""

    artifact: str
    """Its name in reports."""

    folder: Path
    key: str

    format: str
    """Its format's name."""

    def at(self, run: StepContext) -> Path:
        """Return its folder."""
        del run
        return self.folder


@dataclass(frozen=True, eq=False)
class Convert(Step):
    """Pickled weights rewritten as safetensors."""

    revision: ClassVar[int] = 1

    source: PublishedModel
    name: str = "convert to safetensors"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The published model."""
        return (self.source,)

    def key_fields(self) -> object:
        """Return the versions of the libraries that read and write the weights."""
        return versions_of("torch", "safetensors")

    def make(self, run: StepContext, target: Path) -> None:
        """Write the weights."""
        convert_pickle(self.source.at(run), target)
