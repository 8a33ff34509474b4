"""The steps of a plan, in the order they run, each with the key its output is stored under."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.artifact import artifact_format, checkpoint_files
from compress.calibration.questions import source_digest
from compress.calibration.sets import QuestionSource, TextSource
from compress.export.format import VerifiedExport, runtimes_of
from compress.hardware import default_device, describe, gpus, processor
from compress.hub import DatasetPin, ModelPin, resolve_dataset, resolve_model
from compress.quantization_config import Product
from compress.recipe import Recipe
from compress.schema import is_local
from compress.store import Store

if TYPE_CHECKING:
    from compress.eval.latency import LatencySettings

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
"""Raised whenever this package's own part of such a step gives another output for the same settings."""

ORIGINAL = "original"


@dataclass(frozen=True)
class Step:
    """One step: its output is stored under `key`; `position` is its place in the recipe's list of stages or exports.

    A verification is of the `artifact`. A measurement is made at the recipe's place `place`, of the `artifact` (or the original).
    """

    name: str
    kind: Kind
    key: str
    position: int = 0
    expected_bytes: int | None = None
    place: int = 0
    artifact: str = ""


@dataclass(frozen=True)
class DataPin:
    """A calibration set's or task's data, pinned: the digest of a local file, or a hub dataset's commit and files.

    `label` says which hub dataset it is, empty for a local file.
    """

    digest: str
    path: Path | None
    remote: DatasetPin | None
    label: str = ""


@dataclass(frozen=True)
class Sizes:
    """What one should know of the results of stages and exports before they are made: their bytes, by position, and notes.

    `gate_notes` are the gate's limits that they cannot keep, `products` what their linears need kernels for, as far as is known.
    """

    stages: Mapping[int, int]
    exports: Mapping[int, int]
    notes: tuple[str, ...] = ()
    gate_notes: tuple[str, ...] = ()
    products: frozenset[Product] = frozenset()


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions_of(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in names}


class Planner:
    """Works out the steps' keys; a step's key covers everything that shapes its output."""

    def __init__(self, recipe: Recipe, pin: ModelPin, store: Store, sizes: Sizes, given: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.runtimes = {name: runtimes_of(path) for name, path in given.items()}
        self.given = {name: _given_key(path, store) for name, path in given.items()}
        self.device = default_device()
        self.computed_on = [self.device, *gpus()[:1]]  # another GPU has other kernels, which round otherwise
        self.source_key = pin.digest(store.fingerprint)
        self.side_key = pin.side_digest(store.fingerprint)
        self.sizes = sizes
        sets = recipe.calibration.sets if recipe.calibration else ()
        self.sets = tuple(_pin_data(data, store) for data in sets)
        self.tasks = tuple(None if task.data is None else _pin_data(task.data, store) for task in recipe.eval.tasks)
        self.convert = pin.pickled

    def steps(self) -> tuple[Step, ...]:
        """Return the steps, each after those it needs."""
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
        last = weights
        for position, stage in enumerate(self.recipe.stages):
            seed = self.recipe.calibration.seed if self.recipe.calibration else 0
            fields = stage.model_dump(mode="json")
            shaping = [stage.revision, stage.versions(), self.computed_on, seed]
            last = self._key("stage", fields, last, calibration if stage.calibrated else None, *shaping)
            steps.append(Step(self._stage_name(position), "stage", last, position, self.sizes.stages.get(position)))
        exports = {
            export.artifact: self._export_key(position, last) for position, export in enumerate(self.recipe.export)
        } or self.given
        originals = [self._measure(place, ORIGINAL, weights, None) for place in range(len(self.recipe.eval.places))]
        for place, key in enumerate(originals):
            steps.append(Step(f"measure {ORIGINAL}{self._at(place)}", "measure", key, place=place, artifact=ORIGINAL))
        runtimes = {export.artifact: export.runtimes for export in self.recipe.export} or self.runtimes
        for position, (name, key) in enumerate(exports.items()):
            if not self.given:
                steps.append(Step(f"export {name}", "export", key, position, self.sizes.exports.get(position)))
                steps += self._verification(position, name, key)
            for place, original in enumerate(originals):
                if self.recipe.eval.places[place].runtime.runtime not in runtimes[name]:
                    continue
                measured = self._measure(place, name, key, original)
                steps.append(Step(f"measure {name}{self._at(place)}", "measure", measured, position, place=place, artifact=name))
        for place, target in enumerate(self.recipe.eval.places):
            if self.recipe.eval.latency is not None and target.runtime.serves:
                here = {name: key for name, key in exports.items() if target.runtime.runtime in runtimes[name]}
                key = self._latency(place, self.recipe.eval.latency, {ORIGINAL: weights, **here})
                steps.append(Step(f"latency{self._at(place)}", "latency", key, place=place))
        return tuple(steps)

    def _verification(self, position: int, name: str, artifact: str) -> list[Step]:
        """Return the step that compares an artifact with the checkpoint it came from, where its format has one."""
        export = self.recipe.export[position]
        if not isinstance(export, VerifiedExport):
            return []
        how = [export.verification_revision, export.verification_versions(), processor()]  # graphs are computed on the processor
        key = self._key("verify", artifact, *how)
        return [Step(f"verify {name}", "verify", key, position, artifact=name)]

    def _at(self, place: int) -> str:
        """Return what a step's name says of where it measures; nothing where there is one place."""
        return f" at {self.recipe.eval.places[place].name}" if len(self.recipe.eval.places) > 1 else ""

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

    def _measure(self, place: int, name: str, artifact: str, original: str | None) -> str:
        target, check = self.recipe.eval.places[place], self.recipe.eval.grounding
        runtime = target.runtime
        stopping = self.recipe.gate.stopping(target.name, self.recipe.judged_tasks)
        drawn = {name: rule.looks if original is None else rule.describe() for name, rule in stopping.items()}
        noise = self.recipe.eval.noise if original is None and runtime.asks_server else 0
        grounding_confidence = None if original is None else self.recipe.gate.grounding_confidence(target.name)
        how = [drawn, noise, None if check is None else check.model_dump(mode="json"), grounding_confidence]
        shaping = [runtime.settings(name), runtime.revision, runtime.versions(), self.computed_on]
        return self._key("measure", artifact, original, self._task_settings(), how, *shaping)

    def _latency(self, place: int, settings: LatencySettings, models: Mapping[str, str]) -> str:
        """Return the key of a target's latencies, which belong to the machine that they were measured on or from."""
        runtime = self.recipe.eval.places[place].runtime
        pace = runtime.model_dump(mode="json", include=set(runtime.pace))
        shaping = [[runtime.settings(name) | pace for name in models], runtime.revision, runtime.versions(), describe()]
        return self._key("latency", dict(models), settings.model_dump(mode="json"), settings.revision, *shaping)

    def _lineage(self) -> dict[str, Any]:
        """What an artifact's record says of its making beyond what shapes its weights."""
        return self.recipe.model.model_dump(mode="json")

    def _key(self, kind: Kind, *parts: object) -> str:
        return digest_of(kind, _REVISIONS[kind], *parts)


def _given_key(artifact: Path, store: Store) -> str:
    """Return a digest of everything of an artifact that is there already which shapes what is measured of it."""
    if artifact_format(artifact) == "vllm":
        return resolve_model(str(artifact), "huggingface", "main").digest(store.fingerprint)
    return digest_of({path.relative_to(artifact).as_posix(): store.fingerprint(path) for path in checkpoint_files(artifact)})


def _pin_data(data: TextSource | QuestionSource, store: Store) -> DataPin:
    if is_local(data.source):
        path = Path(data.source)
        asked = data if isinstance(data, QuestionSource) else None
        columns, folder = (asked.columns, asked.image_folder) if asked else (None, None)
        content = source_digest(path, columns, store.fingerprint, Path(folder) if folder else None)
        digest = digest_of(path.suffix, content)  # the suffix says how it is read
        return DataPin(digest=digest, path=path, remote=None)
    remote = resolve_dataset(data.source, data.subset, data.split, data.revision)
    return DataPin(digest=remote.digest, path=None, remote=remote, label=remote.label)
