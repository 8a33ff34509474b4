"""Predicted beside measured loss: one layer at a time is rounded, and the model's predictions are compared with the original's.

    python -m benchmarks.sensitivity --model recipes/demo/model \
        --calibration-text recipes/demo/calibration.txt --calibration-questions recipes/demo/calibration.parquet \
        --test-text recipes/demo/test.txt --test-questions recipes/demo/test.parquet --output benchmarks/results/sensitivity.json

The prediction is `compress.engine.sensitivity`'s, from the calibration samples: nats per text token. It is measured as the
mean of KL(original ‖ changed) over the text tokens of the test samples, which it has not seen, and of the calibration samples; both
models run in float32. Layers are rounded to the nearest code of asymmetric grids. `predicted` is what `bits: auto` takes: one of
the widths, `--reference`, is measured token by token and the others relate to it; `independent` takes gradients and inputs as
independent of each other at all widths. `--every 12` measures each twelfth layer of a large model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.stats
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from compress.calibration.batches import Batch, load_batches
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import spec_of
from compress.engine.replay import Replay, WalkConfig
from compress.engine.sensitivity import Forward, OutputErrors, measure_sensitivity
from compress.engine.statistics import observe
from compress.engine.weights import DTYPES
from compress.families.resolve import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.stages.linears import select

TOKENS_PER_BATCH = 4096


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        rows = _compare(arguments, Path(name))
    result = {
        "what": "loss predicted from output sensitivities beside measured KL, one layer rounded at a time",
        "model": arguments.model.name,
        "group_size": arguments.group_size,
        "samples": arguments.samples,
        "summary": {str(width): _summary([row for row in rows if row["width"] == width]) for width in arguments.widths}
        | {"all": _summary(rows), "all, independent": _summary(rows, "independent")},
        "layers": rows,
        "machine": describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("vlm-compress", "torch", "transformers", "scipy")},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "layers"}, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    for kind in ("calibration", "test"):
        parser.add_argument(f"--{kind}-text", type=Path, required=True)
        parser.add_argument(f"--{kind}-questions", type=Path, help="JSONL or parquet; none for text alone")
    parser.add_argument("--samples", type=int, default=48, help="of questions; a quarter as many windows of text")
    parser.add_argument("--tokens", type=int, default=256, help="per window of text")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--reference", type=int, default=4, help="the width that is measured token by token")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _samples(arguments: argparse.Namespace, kind: str, folder: Path) -> Sequence[Batch]:
    text = getattr(arguments, f"{kind}_text").resolve()
    own = TextSet(dataset="text", source=str(text), samples=arguments.samples // 4, tokens=arguments.tokens)
    sets = [PinnedSet(own, (text,))]
    if getattr(arguments, f"{kind}_questions"):
        questions = getattr(arguments, f"{kind}_questions").resolve()
        sets.append(PinnedSet(VqaSet(dataset="vqa", source=str(questions), samples=arguments.samples), (questions,)))
    collect(CalibrationSelection(0, tuple(sets)), arguments.model, folder / kind, Silent())
    return load_batches(folder / kind, arguments.model, TOKENS_PER_BATCH)


def _compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    given, test = (_samples(arguments, kind, folder) for kind in ("calibration", "test"))
    checkpoint = open_checkpoint(arguments.model)
    family = family_of(checkpoint.config)
    linears = [linear.name for linear in select(spec_of(checkpoint, family), ("decoder",), ()).linears]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = WalkConfig(checkpoint, family, given, device, folder)

    def rounded(weight: Tensor, width: int) -> Tensor:
        return quantize(weight, Scheme(width, arguments.group_size, symmetric=False), checkpoint_dtype).dequantize()

    def reference(name: str, weight: Tensor) -> Tensor:
        del name
        return rounded(weight, arguments.reference) - weight

    checkpoint_dtype = DTYPES[checkpoint.tensors[next(iter(checkpoint.tensors))].dtype]
    sensitivities = measure_sensitivity(plan, linears, seed=0, forward=Forward(reference=reference))
    measured_linears = frozenset(linears[:: arguments.every])
    measuring = {"kl_calibration": _Kl(arguments.model, given, device), "kl_test": _Kl(arguments.model, test, device)}
    replay = Replay(plan)
    rows: list[dict[str, Any]] = []
    for visit in replay.walk(replay.decoder_units()):
        local = [name.removeprefix(f"{visit.name}.") for name in linears if name.startswith(f"{visit.name}.")]
        moments = observe(visit, local)
        for name in local:
            full = f"{visit.name}.{name}"
            if full not in measured_linears:
                continue
            weight, sensitivity = visit.module.get_parameter(f"{name}.weight").detach(), sensitivities[full]
            of_reference = OutputErrors.of(rounded(weight, arguments.reference) - weight.float(), moments[name])
            for width in arguments.widths:
                changed = rounded(weight, width)
                errors = OutputErrors.of(changed - weight.float(), moments[name])
                predicted = sensitivity.predicted_loss(errors, of_reference)
                measured = {kind: measure.changed(full, changed) for kind, measure in measuring.items()}
                independent = sensitivity.predicted_loss(errors)
                rows.append({"layer": full, "width": width, "predicted": predicted, "independent": independent, **measured})
                print(full, width, f"{predicted:.3g}", *(f"{value:.3g}" for value in measured.values()), file=sys.stderr)
    return rows


class _Kl:
    """Measures how far a model's predictions of text tokens move when one weight changes."""

    @torch.no_grad()
    def __init__(self, folder: Path, batches: Sequence[Batch], device: str) -> None:
        self.model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.device = device
        self.batches = batches
        self.expected = [self._predict(batch) for batch in batches]

    @torch.no_grad()
    def changed(self, name: str, weight: Tensor) -> float:
        """Return the mean KL in nats per text token with another weight in the place of a linear's own."""
        linear = self.model.get_submodule(name)
        own = linear.weight.data
        linear.weight.data = weight.to(own)
        total = torch.zeros((), dtype=torch.float64)
        for batch, expected in zip(self.batches, self.expected, strict=True):
            total += (expected.exp() * (expected - self._predict(batch))).sum(dtype=torch.float64).cpu()
        linear.weight.data = own
        return float(total) / sum(map(len, self.expected))

    def _predict(self, batch: Batch) -> Tensor:
        inputs = {name: value.to(self.device) for name, value in batch.inputs().items()}
        config = self.model.config
        text = inputs["attention_mask"].bool() & (inputs["input_ids"] != config.image_token_id)
        return self.model(**inputs, use_cache=False).logits[text].float().log_softmax(-1)


def _summary(rows: list[dict[str, Any]], prediction: str = "predicted") -> dict[str, dict[str, float]]:
    summary: dict[str, dict[str, float]] = {}
    predicted = np.array([row[prediction] for row in rows])
    for kind in ("kl_calibration", "kl_test"):
        measured = np.array([row[kind] for row in rows])
        ratios = predicted / measured
        summary[kind] = {
            "rank_correlation": float(cast("Any", scipy.stats).spearmanr(predicted, measured).statistic),
            "ratio_of_sums": float(predicted.sum() / measured.sum()),
            "ratio_median": float(np.median(ratios)),
            "ratio_deviation_of_log": float(np.log(ratios).std()),
            "ratio_smallest": float(ratios.min()),
            "ratio_largest": float(ratios.max()),
        }
    return summary


if __name__ == "__main__":
    main()
