"""Execution of the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.enough import enough_for
from compress.checkpoints.artifact import file_digest, write_record
from compress.data.overlap import check_overlap
from compress.data.samples import MANIFEST, read_manifest
from compress.eval.measure import MeasureContext, measure
from compress.export.format import Export, ExportContext, VerifiedExport, VerifyContext
from compress.files import write_json
from compress.hubs.datasets import Enough
from compress.hubs.hub import fetch_dataset_files, fetch_model
from compress.hubs.pickles import convert_pickle
from compress.pipeline.plan import Plan
from compress.pipeline.planner import ORIGINAL, DataPin, Step
from compress.pipeline.store_entries import Entry
from compress.progress import Progress
from compress.runtimes.runtime import OpenContext
from compress.stages.stage import StageContext

Make = Callable[[Path], None]
"""Fills the output folder of a step."""


@dataclass(frozen=True)
class StepExecutor:
    """Computes the outputs of a plan's steps."""

    plan: Plan

    folder: Path
    """The run's folder."""

    progress: Progress

    entries: Mapping[str, Entry]
    """The store entries of finished steps, by step name; the run adds to them."""

    def maker(self, step: Step) -> Make:
        """Return the function that computes a step's output."""
        makers: Mapping[str, Callable[[Step, Path], None]] = {
            "convert": self._convert,
            "calibration": self._collect,
            "overlap": self._check_overlap,
            "stage": self._apply_stage,
            "export": self._export,
            "verify": self._verify,
            "measure": self._measure,
            "latency": self._latency,
        }
        return partial(makers[step.kind], step)

    @cached_property
    def fetched(self) -> Path:
        """The model's folder in its published format, fetched from a hub where it is not cached."""
        model = self.plan.recipe.model
        return fetch_model(
            self.plan.model, self.progress, allow_pickle=model.allow_pickle, trust_remote_code=model.trust_remote_code
        )

    def original(self) -> Path:
        """Return the original's checkpoint folder, in safetensors."""
        converted = next((self.entries[step.name].folder for step in self.plan.steps if step.kind == "convert"), None)
        return converted or self.fetched

    def versions(self, exports: Sequence[Export]) -> dict[str, str]:
        """Return the versions of this package and of the libraries that shaped the weights and exports, in any environment."""
        import importlib.metadata

        entries = (*self.plan.recipe.stages, *exports)
        libraries = {name: version for entry in entries for name, version in entry.versions().items()}
        return {"vlm-compress": importlib.metadata.version("vlm-compress"), **dict(sorted(libraries.items()))}

    def _convert(self, step: Step, target: Path) -> None:
        del step
        convert_pickle(self.fetched, target)

    def _collect(self, step: Step, target: Path) -> None:
        del step
        calibration = self.plan.recipe.calibration
        assert calibration is not None
        sets = tuple(
            PinnedSet(spec, self.files(pin, enough_for(spec)), pin.label)
            for spec, pin in zip(calibration.sets, self.plan.sets, strict=True)
        )
        remote_code = self.plan.recipe.model.trust_remote_code
        collect(CalibrationSelection(calibration.seed, sets), self.original(), target, self.progress, remote_code)

    def _check_overlap(self, step: Step, target: Path) -> None:
        del step
        warnings: list[str] = []
        for task, pin in zip(self.plan.recipe.eval.tasks, self.plan.tasks, strict=True):
            if pin is None:
                continue
            questions, documents = task.contents(self.files(pin))
            warnings += check_overlap(self.entries["calibration"].folder, questions, documents)
        for warning in warnings[:1]:
            others = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
            self.progress.warn(warning + others)
        write_json(target / "overlap.json", {"overlap": [], "warnings": warnings})

    def _apply_stage(self, step: Step, target: Path) -> None:
        stage = self.plan.recipe.stages[step.position]
        calibration = self.plan.recipe.calibration
        stage.apply(
            StageContext(
                source=self._checkpoint_before(step),
                target=target,
                calibration=self.entries["calibration"].folder if stage.calibrated else None,
                family=self.plan.family,
                device=self.plan.device,
                seed=calibration.seed if calibration else 0,
                progress=self.progress,
                trust_remote_code=self.plan.recipe.model.trust_remote_code,
                logs=self.folder / "logs" / step.name,
            )
        )

    def _checkpoint_before(self, step: Step) -> Path:
        """Return the checkpoint that a stage or an export reads, or that an artifact was exported from."""
        weights = [source for source in self.plan.sources_of(step) if source.kind != "calibration"]
        return self.entries[weights[0].name].folder if weights else self.fetched

    def _export(self, step: Step, target: Path) -> None:
        export = self.plan.recipe.export[step.position]
        export.apply(
            ExportContext(source=self._checkpoint_before(step), target=target, family=self.plan.family, progress=self.progress)
        )
        write_record(target, self._record(step))

    def _verify(self, step: Step, target: Path) -> None:
        from compress.verification.results import write_verification

        export = self.plan.recipe.export[step.position]
        assert isinstance(export, VerifiedExport)
        context = VerifyContext(
            artifact=self.artifact(step.artifact),
            source=self._checkpoint_before(step),
            family=self.plan.family,
            progress=self.progress,
            logs=self._logs(step),
            trust_remote_code=self.plan.recipe.model.trust_remote_code,
        )
        write_verification(target, export.verify(context))

    def _record(self, step: Step) -> dict[str, Any]:
        """Return an artifact's record: its source, and every setting that shaped it."""
        plan, recipe = self.plan, self.plan.recipe
        record: dict[str, Any] = {
            "artifact": recipe.export[step.position].artifact,
            "source": plan.model.describe(),
            "source_digest": plan.source_digest,
            "stages": [stage.model_dump(mode="json") for stage in recipe.stages],
            "export": recipe.export[step.position].model_dump(mode="json"),
            "device": plan.device,
            "versions": self.versions([recipe.export[step.position]]),
        }
        if recipe.calibration:
            folder = self.entries["calibration"].folder
            manifest = read_manifest(folder)
            record["calibration"] = {
                "seed": recipe.calibration.seed,
                "digest": manifest["digest"],
                "manifest_sha256": file_digest(folder / MANIFEST),
                "samples": [sample["sha256"] for sample in cast("list[dict[str, Any]]", manifest["samples"])],
            }
        return record

    def artifact(self, name: str) -> Path:
        """Return the folder of an exported artifact, or of the original."""
        if name == ORIGINAL:
            return self.original()
        return self.plan.existing[name] if name in self.plan.existing else self.entries[f"export {name}"].folder

    def _measure(self, step: Step, target: Path) -> None:
        recipe, name = self.plan.recipe, step.artifact
        measured_on = recipe.eval.places[step.target_index]
        logs = self._logs(step)
        is_original = name == ORIGINAL
        context = MeasureContext(
            original_checkpoint=self.original(),
            data={
                task.name: self.files(pin) for task, pin in zip(recipe.eval.tasks, self.plan.tasks, strict=True) if pin is not None
            },
            output_dir=target,
            original_measurement=None if is_original else self.entries[self.plan.measured(step.target_index, ORIGINAL).name].folder,
            progress=self.progress,
            logs=logs,
            stopping=recipe.gate.stopping(measured_on.name, recipe.judged_tasks),
            noise_samples=recipe.eval.noise if is_original and measured_on.runtime.asks_server else 0,
            grounding=recipe.eval.grounding,
            grounding_confidence=recipe.gate.grounding_confidence(measured_on.name),
        )
        opening = OpenContext(
            artifact=self.artifact(name),
            logs=logs,
            progress=self.progress,
            trust_remote_code=recipe.model.trust_remote_code,
            name=name,
        )
        with measured_on.runtime.open(opening) as session:
            measure(session, recipe.eval.tasks, context)

    def _latency(self, step: Step, target: Path) -> None:
        from compress.eval.latency.measure import LatencyContext, measure_latency
        from compress.eval.latency.results import write_latency

        recipe = self.plan.recipe
        assert recipe.eval.latency is not None
        context = LatencyContext(self._logs(step), self.progress, recipe.model.trust_remote_code)
        artifacts = {name: self.artifact(name) for name in self.plan.artifacts_at(step.target_index)}
        runtime = recipe.eval.places[step.target_index].runtime
        write_latency(target, measure_latency(runtime, self.original(), artifacts, recipe.eval.latency, context))

    def _logs(self, step: Step) -> Path:
        logs = self.folder / "logs" / step.name.removeprefix("measure ")
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    def files(self, pin: DataPin, enough: Enough | None = None) -> tuple[Path, ...]:
        """Return the local files of a set or task, fetched from a hub where they are not cached."""
        if pin.path is not None:
            return (pin.path,)
        assert pin.remote is not None
        return tuple(fetch_dataset_files(pin.remote, enough, self.progress))
