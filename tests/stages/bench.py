"""A tiny checkpoint with calibration samples, to apply stages to, and what is needed to look at what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import AutoModelForImageTextToText

from compress.calibration.batches import load_batches
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import quantized_linears, read_linear
from compress.checkpoints.spec import spec_of
from compress.engine.weights import WeightReader
from compress.families import Family
from compress.families.resolve import family_of
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from compress.stages.stage import Stage, StageContext, StagePlan
from tests.tiny import TEXT, picture


@dataclass(frozen=True)
class Bench:
    """A tiny checkpoint with calibration samples collected for it."""

    folder: Path
    calibration: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @property
    def family(self) -> Family:
        return family_of(self.checkpoint.config)

    def plan(self, stage: Stage) -> StagePlan:
        return stage.plan(spec_of(self.checkpoint, self.family))

    def apply(self, target: Path, stage: Stage) -> Path:
        target.mkdir(exist_ok=True)
        stage.apply(StageContext(self.folder, target, self.calibration, self.family, "cpu", 0, Silent()))
        return target


def prepare(base: Path, folder: Path) -> Bench:
    """Collect six windows of text and four questions with an image each."""
    (base / "text.txt").write_text(TEXT * 8)
    (base / "images").mkdir()
    rows: list[dict[str, str]] = []
    for number in range(4):
        (base / "images" / f"{number}.png").write_bytes(picture(number, 84 + 28 * number))
        rows.append({"id": str(number), "image": f"images/{number}.png", "question": f"How many? {number}", "answer": "three"})
    (base / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = (
        PinnedSet(TextSet(dataset="text", source=str(base / "text.txt"), samples=6, tokens=48), (base / "text.txt",)),
        PinnedSet(VqaSet(dataset="vqa", source=str(base / "questions.jsonl"), samples=4), (base / "questions.jsonl",)),
    )
    collect(CalibrationSelection(0, sets), folder, base / "calibration", Silent())
    return Bench(folder, base / "calibration")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dense(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the model's names, the packed ones as the matrices they stand for."""
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.config)
    reader = WeightReader(checkpoint, family)
    packed = quantized_linears(checkpoint)
    values = {
        family.module_name(name): reader.disk_tensor(name)
        for name in checkpoint.tensors
        if name.rpartition(".weight_")[0] not in packed
    }
    for name, scheme in packed.items():
        values[family.module_name(f"{name}.weight")] = read_linear(name, scheme, reader.disk_tensor).dequantize()
    return values


def logits(source: Path, values: Mapping[str, Tensor] | None, calibration: list[Any]) -> Tensor:
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(source, dtype=torch.float32).eval()
    if values is not None:
        model.load_state_dict({name: value.float() for name, value in values.items()})
    with torch.no_grad():
        return torch.cat([model(**batch.inputs(), use_cache=False).logits.flatten(0, 1) for batch in calibration])


def divergence(bench: Bench, folder: Path) -> float:
    """Return the mean KL(original ‖ artifact) per token in nats on the calibration samples, by the in-process runtime."""
    calibration = [batch.inputs() for batch in load_batches(bench.calibration, bench.folder, 64)]

    def predictions(source: Path) -> Tensor:
        model = load_model(OpenContext.at(source, source, Silent()), torch.float32, torch.device("cpu"))
        with torch.no_grad():
            rows = [model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()] for inputs in calibration]
        return torch.cat(rows).double().log_softmax(-1)

    original, artifact = predictions(bench.folder), predictions(folder)
    return float((original.exp() * (original - artifact)).sum(-1).mean())
