"""The steps of a plan, in the order they run, each with the key of its output in the store."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.checkpoints.artifact import artifact_format, checkpoint_files
from compress.data.questions import source_digest
from compress.data.sources import QuestionSource, TextSource
from compress.export.format import VerifiedExport, runtimes_of
from compress.hardware import default_device, describe, gpus, processor
from compress.hubs.hub import DatasetPin, ModelPin, resolve_dataset, resolve_model
from compress.pipeline.store import Store
from compress.recipe.model import Recipe
from compress.recipe.schema import is_local

if TYPE_CHECKING:
    from compress.eval.latency.settings import LatencySettings
    from compress.pipeline.forecast import Forecast

Kind = Literal["convert", "calibration", "overlap", "stage", "export", "verify", "measure", "latency"]

_REVISIONS: Mapping[Kind, int] = {
    "convert": 1,
    "calibration": 4,
    "overlap": 2,
    "stage": 4,
    "export": 4,
    "verify": 4,
    "measure": 6,
    "latency": 2,
}
"""Raised whenever the package's own code for such a step gives another output for the same settings."""

ORIGINAL = "original"
"""The name of the uncompressed model among the artifacts."""


@dataclass(frozen=True)
class Step:
    """One step of a plan."""

    name: str
    kind: Kind

    key: str
    """The key of its output in the store."""

    position: int = 0
    """The index of its stage or export in the recipe's list."""

    expected_bytes: int | None = None
    """The predicted size of its output, where known."""

    target_index: int = 0
    """The index of the target that a measurement runs on."""

    artifact: str = ""
    """The artifact that is verified or measured, or `ORIGINAL`."""


@dataclass(frozen=True)
class DataPin:
    """The pinned data of a calibration set or task: a local file, or a hub dataset's commit and files."""

    digest: str
    """The digest of the content."""

    path: Path | None
    """The local file; None for a hub dataset."""

    remote: DatasetPin | None
    """The hub dataset; None for a local file."""

    label: str = ""
    """The name of the hub dataset; empty for a local file."""


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions_of(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in names}


class Planner:
    """Lists a recipe's steps with their keys; a key covers everything that shapes a step's output."""

    def __init__(self, recipe: Recipe, pin: ModelPin, store: Store, outlook: Forecast, artifacts: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.runtimes = {name: runtimes_of(path) for name, path in artifacts.items()}
        self.artifact_keys = {name: _artifact_key(path, store) for name, path in artifacts.items()}
        self.device = default_device()
        self.devices = [self.device, *gpus()[:1]]  # another GPU has other kernels, which round differently
        self.source_key = pin.digest(store.fingerprint)
        self.side_key = pin.side_digest(store.fingerprint)
        self.outlook = outlook
        sets = recipe.calibration.sets if recipe.calibration else ()
        self.sets = tuple(_pin_data(data, store) for data in sets)
        self.tasks = tuple(None if task.data is None else _pin_data(task.data, store) for task in recipe.eval.tasks)
        self.convert = pin.pickled

    def steps(self) -> tuple[Step, ...]:
        """Return the steps, each after those that it depends on."""
        steps: list[Step] = []
        weights = self.source_key
        if self.convert:
            weights = self._key("convert", weights, versions_of(("torch", "safetensors")))
            steps.append(Step("convert to safetensors", "convert", weights))
        calibration = self._calibration()
        if calibration:
            steps.append(Step("calibration", "calibration", calibration))
            overlap = self._key("overlap", calibration, self._task_settings())
            steps.append(Step("overlap of calibration and evaluation", "overlap", overlap))
        checkpoint = weights
        for position, stage in enumerate(self.recipe.stages):
            seed = self.recipe.calibration.seed if self.recipe.calibration else 0
            fields = stage.model_dump(mode="json")
            shaping = [stage.revision, stage.versions(), self.devices, seed]
            checkpoint = self._key("stage", fields, checkpoint, calibration if stage.calibrated else None, *shaping)
            steps.append(Step(self._stage_name(position), "stage", checkpoint, position, self._stage_bytes(position)))
        exports = {
            export.artifact: self._export_key(position, checkpoint) for position, export in enumerate(self.recipe.export)
        } or self.artifact_keys
        originals = [self._measure(index, ORIGINAL, weights, None) for index in range(len(self.recipe.eval.places))]
        for index, key in enumerate(originals):
            steps.append(Step(f"measure {ORIGINAL}{self._at(index)}", "measure", key, target_index=index, artifact=ORIGINAL))
        runtimes = {export.artifact: export.runtimes for export in self.recipe.export} or self.runtimes
        for position, (name, key) in enumerate(exports.items()):
            if not self.artifact_keys:
                steps.append(Step(f"export {name}", "export", key, position, self.outlook.export_bytes.get(position)))
                steps += self._verification(position, name, key)
            for index, original in enumerate(originals):
                if self.recipe.eval.places[index].runtime.runtime not in runtimes[name]:
                    continue
                measured = self._measure(index, name, key, original)
                step_name = f"measure {name}{self._at(index)}"
                steps.append(Step(step_name, "measure", measured, position, target_index=index, artifact=name))
        for index, target in enumerate(self.recipe.eval.places):
            if self.recipe.eval.latency is not None and target.runtime.serves:
                runnable = {name: key for name, key in exports.items() if target.runtime.runtime in runtimes[name]}
                key = self._latency(index, self.recipe.eval.latency, {ORIGINAL: weights, **runnable})
                steps.append(Step(f"latency{self._at(index)}", "latency", key, target_index=index))
        return tuple(steps)

    def _stage_bytes(self, position: int) -> int | None:
        return self.outlook.stages[position].max_bytes if self.outlook.stages else None

    def _verification(self, position: int, name: str, artifact: str) -> list[Step]:
        """Return the step that compares an artifact with the checkpoint that it was exported from, where its format has one."""
        export = self.recipe.export[position]
        if not isinstance(export, VerifiedExport):
            return []
        shaping = [export.verification_revision, export.verification_versions(), processor()]  # graphs run on the CPU
        key = self._key("verify", artifact, *shaping)
        return [Step(f"verify {name}", "verify", key, position, artifact=name)]

    def _at(self, target_index: int) -> str:
        """Return the suffix of a step's name that names its target; empty where there is only one."""
        return f" at {self.recipe.eval.places[target_index].name}" if len(self.recipe.eval.places) > 1 else ""

    def _export_key(self, position: int, checkpoint: str) -> str:
        export = self.recipe.export[position]
        fields = export.model_dump(mode="json")
        return self._key("export", fields, checkpoint, export.revision, export.versions(), self._lineage())

    def _stage_name(self, position: int) -> str:
        names = [stage.stage for stage in self.recipe.stages]
        return names[position] if names.count(names[position]) == 1 else f"{names[position]} {position}"

    def _calibration(self) -> str | None:
        calibration = self.recipe.calibration
        if calibration is None:
            return None
        sets = [
            [entry.model_dump(mode="json", exclude={"source", "revision", "subset", "split", "image_folder"}), pin.digest]
            for entry, pin in zip(calibration.sets, self.sets, strict=True)
        ]
        return self._key("calibration", sets, calibration.seed, self.side_key, versions_of(("transformers", "tokenizers")))

    def _task_settings(self) -> list[Any]:
        return [
            [task.settings(), None if pin is None else pin.digest]
            for task, pin in zip(self.recipe.eval.tasks, self.tasks, strict=True)
        ]

    def _measure(self, target_index: int, name: str, artifact: str, original: str | None) -> str:
        target, check = self.recipe.eval.places[target_index], self.recipe.eval.grounding
        runtime = target.runtime
        stopping = self.recipe.gate.stopping(target.name, self.recipe.judged_tasks)
        plan_of_looks = {name: rule.looks if original is None else rule.describe() for name, rule in stopping.items()}
        noise = self.recipe.eval.noise if original is None and runtime.asks_server else 0
        grounding_confidence = None if original is None else self.recipe.gate.grounding_confidence(target.name)
        comparison = [plan_of_looks, noise, None if check is None else check.model_dump(mode="json"), grounding_confidence]
        shaping = [runtime.settings(name), runtime.revision, runtime.versions(), self.devices]
        return self._key("measure", artifact, original, self._task_settings(), comparison, *shaping)

    def _latency(self, target_index: int, settings: LatencySettings, models: Mapping[str, str]) -> str:
        """Return the key of a target's latencies, which depend on the machine that they are measured on or from."""
        runtime = self.recipe.eval.places[target_index].runtime
        pace = runtime.model_dump(mode="json", include=set(runtime.pace))
        shaping = [[runtime.settings(name) | pace for name in models], runtime.revision, runtime.versions(), describe()]
        return self._key("latency", dict(models), settings.model_dump(mode="json"), settings.revision, *shaping)

    def _lineage(self) -> dict[str, Any]:
        """Return the settings in an artifact's record beyond those that shape its weights."""
        return self.recipe.model.model_dump(mode="json")

    def _key(self, kind: Kind, *parts: object) -> str:
        return digest_of(kind, _REVISIONS[kind], *parts)


def _artifact_key(artifact: Path, store: Store) -> str:
    """Return a digest of everything in an existing artifact that shapes its measurements."""
    if artifact_format(artifact) == "vllm":
        return resolve_model(str(artifact), "huggingface", "main").digest(store.fingerprint)
    return digest_of({path.relative_to(artifact).as_posix(): store.fingerprint(path) for path in checkpoint_files(artifact)})


def _pin_data(data: TextSource | QuestionSource, store: Store) -> DataPin:
    if is_local(data.source):
        path = Path(data.source)
        questions = data if isinstance(data, QuestionSource) else None
        columns, folder = (questions.columns, questions.image_folder) if questions else (None, None)
        content = source_digest(path, columns, store.fingerprint, Path(folder) if folder else None)
        digest = digest_of(path.suffix, content)  # the suffix decides how it is read
        return DataPin(digest=digest, path=path, remote=None)
    remote = resolve_dataset(data.source, data.subset, data.split, data.revision)
    return DataPin(digest=remote.digest, path=None, remote=remote, label=remote.label)
