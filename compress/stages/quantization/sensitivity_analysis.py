"""Analysis before quantization: each linear's sensitivity, the weights of the modalities, and the allocation of bits.

Results are committed in the stage's folder, so that a killed stage does not compute them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save
from torch import Tensor

from compress.calibration.batches import Batch, QuestionBatch, WindowBatch
from compress.checkpoints.checkpoint import read_header
from compress.engine.replay import BlockVisit, Replay
from compress.engine.sensitivity import Sensitivity, balance, measure_sensitivity, share
from compress.engine.statistics import InputStatistics, observe
from compress.engine.weights import map_tensor
from compress.errors import CheckpointError
from compress.families import within
from compress.files import write_bytes, write_json
from compress.stages.blockwise.run import StageRun
from compress.stages.quantization.method import solve
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, MixedPrecision, Widths

if TYPE_CHECKING:
    from compress.stages.quantization.quantizer import Quantizer

SENSITIVITY_TOKENS = 16384
"""Tokens of the calibration samples that sensitivities are measured on. More make them more exact and the two walks longer."""

_FOLDER = "preparation"
"""The folder of committed results beside the commits of blocks."""


@dataclass(frozen=True)
class SensitivityAnalysis:
    """The results; empty where no setting needs them."""

    sensitivities: Mapping[str, Sensitivity] = field(default_factory=lambda: dict[str, Sensitivity]())
    """By the linears' names in the model."""

    widths: Widths | None = None
    """The chosen widths of `bits: auto`."""


def analyze_sensitivity(stage: Quantizer, run: StageRun, mixed_precision: MixedPrecision | None) -> SensitivityAnalysis:
    """Measure what the stage's `balance` and `bits` need.

    Raises:
        CheckpointError: the weights cannot be used, or the budget cannot be met.
        MissingError: the device has too little memory.
    """
    names = _linears_to_measure(stage, run, mixed_precision)
    if not names:
        return SensitivityAnalysis()
    (run.work / _FOLDER).mkdir(parents=True, exist_ok=True)
    sensitivities = _sensitivities(run, names)
    if mixed_precision is None:
        return SensitivityAnalysis(sensitivities)
    return SensitivityAnalysis(sensitivities, BitAllocation(stage, run, mixed_precision, sensitivities).widths())


def _linears_to_measure(stage: Quantizer, run: StageRun, mixed_precision: MixedPrecision | None) -> list[str]:
    """Return the linears whose sensitivity is needed: those whose width is chosen, and those that see text and vision tokens."""
    names = [linear.name for linear in mixed_precision.linears] if mixed_precision else []
    if stage.balance == "auto" and run.family.head is not None:
        names += [name for name, linear in run.targeted.items() if linear.component in ("decoder", "lm_head")]
    # without repetition, in a fixed order: a set's order changes from process to process
    return list(dict.fromkeys(names))


def _sensitivities(run: StageRun, names: Sequence[str]) -> dict[str, Sensitivity]:
    path = run.work / _FOLDER / "sensitivities.safetensors"
    tensors = _read_tensors(path)
    if tensors is None:
        batches = subsample(run.batches, SENSITIVITY_TOKENS)
        config = replace(run.walk_config, batches=batches)
        # a forward walk and one in reverse
        blocks = 2 * int(run.checkpoint.text_config["num_hidden_layers"])
        with run.context.progress.task(f"{run.stage}: sensitivity", blocks, "blocks") as advance:
            try:
                measured = measure_sensitivity(config, names, run.context.seed, advance)
            except torch.OutOfMemoryError as error:
                raise run.out_of_memory("a decoder block in float32 and its gradients") from error
        # float32 on disk and read back even in this process: a resumed run computes with the same bytes
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in _to_tensors(measured).items()}))
        tensors = _read_tensors(path)
        assert tensors is not None
    return {name: _from_tensors(name, tensors) for name in names}


def subsample(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return evenly spaced batches of about so many tokens: the same share of text windows and of image questions.

    At least one batch of each kind is returned where there is any.
    """
    total = sum(batch.tokens for batch in batches)
    chosen: list[Batch] = []
    for kind in (WindowBatch, QuestionBatch):
        members = [batch for batch in batches if isinstance(batch, kind)]
        count = min(len(members), max(1, round(len(members) * tokens / total)))
        # questions are sorted by length: the middles of equal parts represent short and long ones
        chosen += [members[(2 * index + 1) * len(members) // (2 * count)] for index in range(count)]
    return chosen


def _to_tensors(sensitivities: Mapping[str, Sensitivity]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, sensitivity in sensitivities.items():
        tensors[f"{name}.per_token"] = torch.tensor(sensitivity.per_token, dtype=torch.float64)
        for kind, values in (("text", sensitivity.text), ("vision", sensitivity.vision)):
            if values is not None:
                tensors[f"{name}.{kind}"] = values
    return tensors


def _from_tensors(name: str, tensors: Mapping[str, Tensor]) -> Sensitivity:
    text, vision = cast("list[float]", tensors[f"{name}.per_token"].tolist())
    return Sensitivity(tensors.get(f"{name}.text"), tensors.get(f"{name}.vision"), (text, vision))


def set_modality_weights(
    statistics: Mapping[str, InputStatistics], setting: float | str, sensitivities: Mapping[str, Sensitivity | None]
) -> None:
    """Set the weights of text and vision tokens by a stage's `balance`; linears that share an input share them.

    Linears whose sensitivity is None do not count.
    """
    if setting == "tokens":
        return
    # by identity: linears that share an input share one Hessian, which can have one weighting only
    by_input: dict[int, tuple[InputStatistics, list[Sensitivity]]] = {}
    for name, inputs in statistics.items():
        _, of_readers = by_input.setdefault(id(inputs), (inputs, []))
        sensitivity = sensitivities[name]
        of_readers += [] if sensitivity is None else [sensitivity]
    for inputs, of_readers in by_input.values():
        inputs.weights = balance(inputs, of_readers) if isinstance(setting, str) else share(inputs, setting)


@dataclass(frozen=True)
class BitAllocation:
    """Chooses widths by the predicted loss of each layer at each width, from the method's own rounding of the original weights.

    Scales that the method moves between layers are not applied: they depend on the widths of all layers of a block.
    """

    stage: Quantizer
    run: StageRun
    mixed_precision: MixedPrecision
    sensitivities: Mapping[str, Sensitivity]

    def widths(self) -> Widths:
        """Return the widths of the smallest predicted loss."""
        losses: dict[str, dict[int, float]] = {}
        replay = Replay(self.run.walk_config)
        names = {linear.name for linear in self.mixed_precision.linears}
        units = [*replay.decoder_units(), *([self.run.family.head] if self.run.family.head in names else [])]
        targeted = [unit for unit in units if any(within(name, unit) for name in names)]
        by_unit = {unit: _read_losses(self._path(unit)) for unit in targeted}
        if any(unit_losses is None for unit_losses in by_unit.values()):
            with self.run.context.progress.task(f"{self.run.stage}: widths", len(units), "blocks") as advance:
                try:
                    for visit in replay.walk(units):
                        if visit.name in by_unit and by_unit[visit.name] is None:
                            by_unit[visit.name] = self._predict(visit, [name for name in names if within(name, visit.name)])
                            write_json(self._path(visit.name), by_unit[visit.name])
                        advance(1)
                except torch.OutOfMemoryError as error:
                    raise self.run.out_of_memory(replay.current) from error
        for unit_losses in by_unit.values():
            losses |= unit_losses or {}
        return self.mixed_precision.choose(losses)

    def _path(self, unit: str) -> Path:
        return self.run.work / _FOLDER / f"{unit}.json"

    def _predict(self, visit: BlockVisit, names: list[str]) -> dict[str, dict[int, float]]:
        """Return the predicted loss of a block's linears, by names on disk, at each width."""
        # names come from a set: sorted, because the order of linears is that of rounding in batches
        context = self.run.open(visit, sorted(names))
        statistics = observe(context.visit, context.local.values())
        set_modality_weights(
            statistics, self.stage.balance, {local: self.sensitivities[name] for name, local in context.local.items()}
        )
        losses: dict[str, dict[int, float]] = {self._disk_name(name): {} for name in context.local}
        for width in self.mixed_precision.quantized_widths:
            block = context.weights()
            schemes = {local: self.mixed_precision.scheme(self.run.targeted[name], width) for name, local in context.local.items()}
            # no `may_overwrite`: every width reads the same Hessians
            quantized = solve(block, (), statistics, schemes, self.stage.method())
            for name, local in context.local.items():
                # rounded to the stored type, as a runtime's weight is
                weight = quantized[local].dequantize(quantized[local].scales.dtype).to(torch.float32)
                loss = self.sensitivities[name].predicted_loss(weight.sub_(block.weights[local]), statistics[local])
                losses[self._disk_name(name)][width] = loss
        if UNQUANTIZED_WIDTH in self.mixed_precision.widths:
            for by_width in losses.values():
                by_width[UNQUANTIZED_WIDTH] = 0.0
        return losses

    def _disk_name(self, name: str) -> str:
        return self.run.targeted[name].disk_name


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return committed tensors; None where they are missing or damaged."""
    with suppress(CheckpointError):
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}
    return None


def _read_losses(path: Path) -> dict[str, dict[int, float]] | None:
    """Return the committed losses of a block; None where they are missing or damaged."""
    with suppress(OSError, ValueError, AttributeError):
        content = cast("dict[str, dict[str, float]]", json.loads(path.read_text(encoding="utf-8")))
        return {name: {int(width): loss for width, loss in losses.items()} for name, losses in content.items()}
    return None
