"""What is found out before a stage rounds anything: how sensitive each linear is, and which width each gets.

Each finding is committed in the stage's folder, so that a stage that was killed does not make it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from compress.calibration.batches import Batch, QuestionBatch, WindowBatch
from compress.engine.replay import BlockVisit, Replay
from compress.engine.sensitivity import Sensitivity, balance, measure_sensitivity, share
from compress.engine.statistics import Moments, observe
from compress.families import within
from compress.files import write_json
from compress.stages.solvers import solve
from compress.stages.stage_run import StageRun, read_commit, write_commit
from compress.stages.widths import LEFT, Mixture, Widths

SENSITIVITY_TOKENS = 16384
"""How many positions of calibration samples the sensitivities are measured on."""

_FOLDER = "preparation"


@dataclass(frozen=True)
class SensitivityAnalysis:
    """What was found out; both are empty where nothing asks for them."""

    sensitivities: Mapping[str, Sensitivity] = field(default_factory=lambda: dict[str, Sensitivity]())
    widths: Widths | None = None


def analyze_sensitivity(run: StageRun) -> SensitivityAnalysis:
    """Measure what the stage's `balance` and `bits` ask for.

    Raises:
        CheckpointError: the weights cannot be used, or the budget not kept.
        MissingError: the device has too little memory.
    """
    mixture = run.stage.mixture(run.checkpoint, run.family)
    names = _weighed(run, mixture)
    if not names:
        return SensitivityAnalysis()
    (run.commits / _FOLDER).mkdir(parents=True, exist_ok=True)
    sensitivities = _sensitivities(run, names)
    if mixture is None:
        return SensitivityAnalysis(sensitivities)
    return SensitivityAnalysis(sensitivities, BitAllocation(run, mixture, sensitivities).widths())


def _weighed(run: StageRun, mixture: Mixture | None) -> list[str]:
    """Return the linears whose sensitivity is asked for: those to be given widths, and those that see text and images."""
    names = [linear.name for linear in mixture.linears] if mixture else []
    if run.stage.balance == "auto" and run.family.head is not None:
        names += [name for name, linear in run.targeted.items() if linear.part in ("decoder", "lm_head")]
    return list(dict.fromkeys(names))


def _sensitivities(run: StageRun, names: Sequence[str]) -> dict[str, Sensitivity]:
    path = run.commits / _FOLDER / "sensitivities.safetensors"
    tensors = read_commit(path)
    if tensors is None:
        batches = subsample(run.batches, SENSITIVITY_TOKENS)
        replay_plan = replace(run.walk_config, batches=batches)
        blocks = 2 * int(run.checkpoint.text_config["num_hidden_layers"])
        with run.context.progress.task(f"{run.stage.stage}: sensitivity", blocks, "blocks") as advance:
            try:
                measured = measure_sensitivity(replay_plan, names, run.context.seed, advance)
            except torch.OutOfMemoryError as error:
                raise run.out_of_memory("a decoder block in float32 and its gradients") from error
        write_commit(path, _packed(measured))
        tensors = read_commit(path)
        assert tensors is not None
    return {name: _unpacked(name, tensors) for name in names}


def subsample(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return batches of about so many positions, taken evenly from all of them: of windows and of questions the same part.

    Of each kind that there is at least one is taken.
    """
    total = sum(batch.tokens for batch in batches)
    taken: list[Batch] = []
    for kind in (WindowBatch, QuestionBatch):
        members = [batch for batch in batches if isinstance(batch, kind)]
        count = min(len(members), max(1, round(len(members) * tokens / total)))
        taken += [members[(2 * number + 1) * len(members) // (2 * count)] for number in range(count)]
    return taken


def _packed(sensitivities: Mapping[str, Sensitivity]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, found in sensitivities.items():
        tensors[f"{name}.per_token"] = torch.tensor(found.per_token, dtype=torch.float64)
        for kind, values in (("text", found.text), ("vision", found.vision)):
            if values is not None:
                tensors[f"{name}.{kind}"] = values
    return tensors


def _unpacked(name: str, tensors: Mapping[str, Tensor]) -> Sensitivity:
    text, vision = cast("list[float]", tensors[f"{name}.per_token"].tolist())
    return Sensitivity(tensors.get(f"{name}.text"), tensors.get(f"{name}.vision"), (text, vision))


def set_modality_weights(
    moments: Mapping[str, Moments], rule: float | str, sensitivities: Mapping[str, Sensitivity | None]
) -> None:
    """Set how much text and vision tokens count, by the rule that a stage's `balance` is; linears with one input have one weight.

    A linear whose sensitivity is None has no say in it.
    """
    if rule == "tokens":
        return
    readers: dict[int, tuple[Moments, list[Sensitivity]]] = {}
    for name, found in moments.items():
        _, gathered = readers.setdefault(id(found), (found, []))
        measured = sensitivities[name]
        gathered += [] if measured is None else [measured]
    for found, gathered in readers.values():
        found.weights = balance(found, gathered) if isinstance(rule, str) else share(found, rule)


@dataclass(frozen=True)
class BitAllocation:
    """Predicts what each width of each layer would lose, by the method's own rounding of the original weights.

    Scales that the method would move between layers are left out; they need all widths of a block to be known.
    """

    run: StageRun
    mixture: Mixture
    sensitivities: Mapping[str, Sensitivity]

    def widths(self) -> Widths:
        """Return the widths that lose least."""
        losses: dict[str, dict[int, float]] = {}
        replay = Replay(self.run.walk_config)
        names = {linear.name for linear in self.mixture.linears}
        units = [*replay.decoder_units(), *([self.run.family.head] if self.run.family.head in names else [])]
        wanted = [unit for unit in units if any(within(name, unit) for name in names)]
        found = {unit: _read_losses(self._path(unit)) for unit in wanted}
        if any(part is None for part in found.values()):
            with self.run.context.progress.task(f"{self.run.stage.stage}: widths", len(units), "blocks") as advance:
                try:
                    for visit in replay.walk(units):
                        if visit.name in found and found[visit.name] is None:
                            found[visit.name] = self._predict(visit, [name for name in names if within(name, visit.name)])
                            write_json(self._path(visit.name), found[visit.name])
                        advance(1)
                except torch.OutOfMemoryError as error:
                    raise self.run.out_of_memory(replay.at) from error
        for part in found.values():
            losses |= part or {}
        return self.mixture.choose(losses)

    def _path(self, unit: str) -> Path:
        return self.run.commits / _FOLDER / f"{unit}.json"

    def _predict(self, visit: BlockVisit, names: list[str]) -> dict[str, dict[int, float]]:
        """Return, by names on disk, what each width of a part's linears would lose."""
        part = self.run.open(visit, sorted(names))
        moments = observe(part.visit, part.local.values())
        set_modality_weights(
            moments, self.run.stage.balance, {local: self.sensitivities[name] for name, local in part.local.items()}
        )
        losses: dict[str, dict[int, float]] = {self._disk_name(name): {} for name in part.local}
        for width in self.mixture.rounded:
            block = part.weights()
            schemes = {local: self.mixture.scheme(self.run.targeted[name], width) for name, local in part.local.items()}
            codes = solve(block, (), moments, schemes, self.run.stage.method())
            for name, local in part.local.items():
                rounded = codes[local].dequantize(codes[local].scales.dtype).to(torch.float32)
                loss = self.sensitivities[name].predicted_loss(rounded.sub_(block.weights[local]), moments[local])
                losses[self._disk_name(name)][width] = loss
        if LEFT in self.mixture.widths:
            for by_width in losses.values():
                by_width[LEFT] = 0.0
        return losses

    def _disk_name(self, name: str) -> str:
        return self.run.targeted[name].disk_name


def _read_losses(path: Path) -> dict[str, dict[int, float]] | None:
    """Return the committed losses of a part; None where they are not there or damaged."""
    with suppress(OSError, ValueError, AttributeError):
        content = cast("dict[str, dict[str, float]]", json.loads(path.read_text(encoding="utf-8")))
        return {name: {int(width): loss for width, loss in losses.items()} for name, losses in content.items()}
    return None
